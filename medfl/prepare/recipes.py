"""The data sets that can be prepared: how each is read, what it looks like, and where it is from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from medfl.errors import ConfigError, DataError, one_of
from medfl.files import write_bytes
from medfl.prepare import brats, chest_labels, chest_masks, decathlon, folders
from medfl.prepare.contents import ARCHIVES, Contents, Missing, scan
from medfl.prepare.table import Table, datalist, with_splits
from medfl.prepare.unpack import place, written

DATALIST = "datalist.csv"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One data set.

    Attributes:
        read: contents and options -> table.
        layout: what is needed, in one line.
        origin: where it is from.
        options: name -> the words allowed, the default first.
    """

    read: Callable[..., Table]
    layout: str
    origin: str
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


RECIPES: Mapping[str, Recipe] = {
    "decathlon": Recipe(
        read=decathlon.decathlon,
        layout="one task: TaskNN_NAME.tar, or dataset.json beside imagesTr, labelsTr and imagesTs",
        origin="http://medicaldecathlon.com",
    ),
    "nih": Recipe(
        read=chest_labels.nih,
        layout="Data_Entry_2017.csv (or _v2020), images_001.tar.gz to images_012.tar.gz (or their PNG files), "
        "train_val_list.txt and test_list.txt",
        origin="https://nihcc.app.box.com/v/ChestXray-NIHCC",
    ),
    "chexpert": Recipe(
        read=chest_labels.chexpert,
        layout="train.csv, valid.csv and patientNNNNN/studyN/viewN_frontal.jpg, of CheXpert-v1.0 or -small",
        origin="https://stanfordmlgroup.github.io/competitions/chexpert/",
        options={"uncertain": tuple(chest_labels.UNCERTAIN)},
    ),
    "siim": Recipe(
        read=chest_masks.siim,
        layout="dicom-images-train (DICOM) with train-rle.csv or stage_2_train.csv, or the re-release with png_images, "
        "png_masks and stage_1_train_images.csv",
        origin="https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation (re-release: "
        "https://www.kaggle.com/datasets/vbookshelf/pneumothorax-chest-xray-images-and-masks)",
    ),
    "rsna": Recipe(
        read=chest_masks.rsna,
        layout="stage_2_train_images (DICOM) and stage_2_train_labels.csv, if at hand with "
        "stage_2_detailed_class_info.csv and pneumonia-challenge-dataset-mappings_2018.json",
        origin="https://www.kaggle.com/c/rsna-pneumonia-detection-challenge",
    ),
    "covid_radiography": Recipe(
        read=folders.covid_radiography,
        layout="the folders COVID, Lung_Opacity, Normal and Viral Pneumonia, each with images/",
        origin="https://www.kaggle.com/datasets/tawsifurrahman/covid19-radiography-database",
    ),
    "isic2018": Recipe(
        read=folders.isic2018,
        layout="ISIC2018_Task1-2_Training_Input and ISIC2018_Task1_Training_GroundTruth, likewise Validation and Test; "
        "task=classification: ISIC2018_Task3_Training_Input, _GroundTruth and _LesionGroupings.csv",
        origin="https://challenge.isic-archive.com/data/#2018",
        options={"task": ("segmentation", "classification")},
    ),
    "kvasir": Recipe(
        read=folders.kvasir,
        layout="kvasir-seg.zip, or its images/ and masks/; train.txt and val.txt of the authors if at hand",
        origin="https://datasets.simula.no/kvasir-seg/",
    ),
    "brats": Recipe(
        read=brats.brats,
        layout="one folder per case with its NIfTI files, as BraTS2021_00000/BraTS2021_00000_flair.nii.gz or "
        "BraTS-GLI-00000-000/BraTS-GLI-00000-000-t2f.nii.gz; train.txt, valid.txt and test.txt of NSLF's authors "
        "(github.com/ImZhangyYing/NLSF) if at hand",
        origin="https://www.synapse.org/brats (registration)",
    ),
}


def prepare(
    name: str, source: Path, to: Path, *, options: Mapping[str, str], val: float, show: Callable[[str], None]
) -> Table:
    """Write `to`/datalist.csv, and unpack or link the images that it names; returns the table.

    Args:
        options: of the data set, see `Recipe.options`.
        val: share of the training patients for validation, where the publishers have a test split alone.
        show: takes lines about what is being done.

    Raises:
        ConfigError: an unknown data set or option.
        DataError: not the data set's layout, a damaged or hostile archive, or a data list that exists.
        ResourceError: not enough space.
    """
    one_of("medfl prepare NAME", name, RECIPES)
    recipe, given = RECIPES[name], _options(name, options)
    if (to / DATALIST).exists():
        raise DataError(f"{to / DATALIST}: exists and is not written over. Remove it, or choose another folder as to=.")
    contents = scan(source, besides=to, show=show)
    try:
        table = recipe.read(contents, **given)
    except Missing as error:
        raise _unlike(name, contents, str(error)) from None
    if not table.rows:
        raise _unlike(name, contents, "image that its tables name")
    table = with_splits(replace(table, left_out=table.left_out + contents.left_out), val)
    wanted = {row[column] for row in table.rows for column in table.files} - {"", *table.drawn}
    places = place(contents, sorted(wanted), to, show)
    _draw(table, to, show)
    write_bytes(to / DATALIST, datalist(table, places))
    return table


def _options(name: str, given: Mapping[str, str]) -> dict[str, str]:
    """All options of a data set, with defaults for those not given."""
    known = RECIPES[name].options
    for option, word in given.items():
        if option not in known:
            have = ", ".join(f"{key}={'|'.join(words)}" for key, words in known.items()) or "none"
            raise ConfigError(f"medfl prepare {name}: got the option {option!r}, need one of: {have}.")
        one_of(f"medfl prepare {name} {option}", word, known[option])
    return {option: given.get(option, words[0]) for option, words in known.items()}


def _unlike(name: str, contents: Contents, missing: str) -> DataError:
    recipe, shown = RECIPES[name], list(contents.files)
    packed = sum(file.lower().endswith(ARCHIVES) for file in shown)
    got = f"{len(shown):,} files, such as {', '.join(shown[:3])}" if shown else "no file"
    inner = f" {packed} of them are archives inside an archive: unpack those first." if packed else ""
    return DataError(
        f"{contents.source}: got {got}, and no {missing}.{inner} medfl prepare {name} needs {recipe.layout}. "
        f"Get it from {recipe.origin}"
    )


def _draw(table: Table, to: Path, show: Callable[[str], None]) -> None:
    """Write the masks that are made here."""
    if table.drawn:
        show(f"drawing {len(table.drawn):,} masks")
    for path, draw in table.drawn.items():
        if not (to / path).is_file():
            with written(to / path) as file:
                Image.fromarray(draw()).save(file, format="png")
