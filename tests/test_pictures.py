"""Pictures show the right slices and labels, stay with this user, and tell nothing of who is on them."""

import io
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from medfl.config import compose
from medfl.data.sample import UNLABELLED, SiteData, Split
from medfl.data.subject import REGIONS
from medfl.evaluation import pictures, volume_slices
from medfl.evaluation.slices import plane, plane_moves, write_png

MODALITIES = ("flair", "t1ce", "t2")
GRIDS = {2: (16, 12), 3: (16, 12, 8)}
PLAN = replace(compose([]).evaluation, resamples=10, batch_size=2)
NAMES = volume_slices.label_names(REGIONS)
CPU = torch.device("cpu")


class Largest(torch.nn.Module):
    """Fuses by the largest value, and calls everything above 0.5 in the first modality enhancing."""

    def fuse(self, images):
        return images.amax(1, keepdim=True)

    def segment(self, images):
        logits = torch.zeros(len(images), 4, *images.shape[2:])
        logits[:, 0] = 0.5
        logits[:, 3] = images[:, 0]
        return logits


def still(images):
    return SimpleNamespace(field=torch.zeros(len(images), images.ndim - 2, *images.shape[2:]))


METHOD = SimpleNamespace(encoder=Largest(), matching=None, match=still)


def site(dims=3, *, lacking=(), masks=(0, 1, 2, 3)):
    """Four test images of three modalities; `lacking`: (image, channel) pairs, `masks`: the labelled images."""
    draw = torch.Generator().manual_seed(dims)
    images = torch.rand(4, 3, *GRIDS[dims], generator=draw).clamp_min(0.01)
    for image, channel in lacking:
        images[image, channel] = 0
    known = torch.full((4, *GRIDS[dims]), UNLABELLED, dtype=torch.uint8)
    for image in masks:
        known[image] = 0
        known[image, 4:9, 4:9] = 3
    split = Split(images, torch.full((4,), -1), tuple(f"SECRET-{n}" for n in range(4)), known)
    return SiteData("site-1", split, split, split, (), (2.0, 2.0, 3.0)[:dims], "", False, MODALITIES, REGIONS)


def segmented(looks, truth, predicted):
    return volume_slices.segmentation(looks, truth, predicted, names=NAMES, base="fused", spacing=(1.0, 1.0, 1.0))


def words(sheet):
    return [text.get_text() for text in sheet.axes.texts]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def count_of(image, colour):
    """Pixels of a label's colour over black."""
    blended = np.array([round(0.6 * 255 * part) for part in to_rgb(colour)])
    return int((np.abs(image - blended).max(axis=-1) <= 2).sum())


@pytest.mark.parametrize("dims", [2, 3])
def test_all_pictures_are_drawn_for_this_user_alone(tmp_path, dims):
    found = pictures.draw(METHOD, site(dims), tmp_path / "state", CPU, arm="local:site-1", plan=PLAN)
    folder = tmp_path / "state" / "pictures" / "site-1" / "local-site-1"
    assert found == [folder / name for name in ("fusion.png", "segmentation.png", "field.png")]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in found)
    levels = (folder, folder.parent, folder.parent.parent)
    assert all(level.stat().st_mode & 0o777 == 0o700 for level in levels)
    assert all(pixels(path).std() > 10 for path in found)


def test_the_mode_does_not_depend_on_the_umask(tmp_path):
    before = os.umask(0)
    try:
        found = pictures.draw(METHOD, site(), tmp_path, CPU, arm="federated", plan=PLAN)
    finally:
        os.umask(before)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in found)
    assert found[0].parent.stat().st_mode & 0o777 == 0o700


def test_equal_pictures_have_equal_bytes(tmp_path):
    first, again = (
        pictures.draw(METHOD, site(), tmp_path / place, CPU, arm="federated", plan=PLAN) for place in ("a", "b")
    )
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


def test_no_patient_is_named(tmp_path):
    for path in pictures.draw(METHOD, site(), tmp_path, CPU, arm="federated", plan=PLAN):
        assert b"SECRET" not in path.read_bytes()
        assert not Image.open(path).info.keys() - {"dpi"}
    sheet = volume_slices.fusion({1: site().test.images[1]}, {1: torch.zeros(GRIDS[3])}, MODALITIES, (1.0, 1.0, 1.0))
    assert "test image 2\nslice 5 of 8" in words(sheet)


def test_what_cannot_be_drawn_is_left_out(tmp_path):
    one = site(lacking=[(image, channel) for image in range(4) for channel in (1, 2)])
    assert [path.name for path in pictures.draw(METHOD, one, tmp_path, CPU, arm="a", plan=PLAN)] == ["segmentation.png"]
    unmatched = SimpleNamespace(encoder=METHOD.encoder)
    names = [path.name for path in pictures.draw(unmatched, site(), tmp_path, CPU, arm="b", plan=PLAN)]
    assert names == ["fusion.png", "segmentation.png"]
    empty = site(lacking=[(image, channel) for image in range(4) for channel in range(3)])
    assert pictures.draw(METHOD, empty, tmp_path, CPU, arm="c", plan=PLAN) == []


def test_windows_of_the_scores_are_those_of_the_pictures(tmp_path):
    seen = []

    class Watched(Largest):
        def fuse(self, images):
            seen.append(tuple(images.shape[2:]))
            return super().fuse(images)

    method = SimpleNamespace(encoder=Watched(), matching=None, match=lambda images: seen.append("m") or still(images))
    plan = replace(PLAN, window=(8, 8, 8))
    assert len(pictures.draw(method, site(), tmp_path, CPU, arm="a", plan=plan)) == 3
    assert set(seen) == {(8, 8, 8), "m"}


def test_each_modality_has_a_column_and_an_absent_one_is_said():
    images = {0: torch.rand(3, *GRIDS[3]), 2: torch.rand(3, *GRIDS[3])}
    images[0][1], images[0][2], images[2][2] = 0, 0, 0
    sheet = volume_slices.fusion(
        images, {row: image.amax(0) for row, image in images.items()}, MODALITIES, (1.0, 1.0, 1.0)
    )
    said = words(sheet)
    assert said[:4] == ["flair", "t1ce", "fused", "mean of sources"]  # nobody has t2
    assert said.count("not there") == 1
    assert len(sheet.axes.images) == 2 * 4 - 1


def test_labels_are_painted_where_they_are(tmp_path):
    black = torch.zeros(GRIDS[3])
    truth = torch.zeros(GRIDS[3], dtype=torch.uint8)
    truth[:, :, 3], truth[:8, :, 3] = 1, 2
    sheet = segmented({0: black[None]}, {0: truth}, {0: torch.full_like(truth, 3)})
    shown = pixels(write_png(sheet.figure, tmp_path / "s.png"))
    cell = sheet.tall * 1.65 * 110**2
    for label, share in {1: 0.5, 2: 0.5, 3: 1.0}.items():
        assert count_of(shown, volume_slices.COLOURS[label - 1]) == pytest.approx(share * cell, rel=0.05)
    assert "slice 4 of 8" in words(sheet)[-1]  # where the tumour is


def test_an_unlabelled_image_shows_its_prediction_alone():
    labels = torch.zeros(GRIDS[3], dtype=torch.uint8)
    labels[2:5, 2:5, 6] = 3
    sheet = segmented({1: torch.rand(1, *GRIDS[3])}, {}, {1: labels})
    assert {"not labelled", "test image 2\nslice 7 of 8"} <= set(words(sheet))
    assert len(sheet.axes.images) == 3  # fused, and fused below the prediction


def test_labels_are_called_after_the_smallest_region_that_has_them():
    tumour = volume_slices.label_names(REGIONS)
    assert {label: name[:3] for label, name in tumour.items()} == {1: "NCR", 2: "ED:", 3: "ET:"}
    assert volume_slices.label_names({"head": (1,), "tail": (2,)}) == {1: "head", 2: "tail"}
    assert volume_slices.label_names({"organ": (1, 2), "lesion": (2,)}) == {1: "rest of organ", 2: "lesion"}


def test_labelled_images_come_first(tmp_path, monkeypatch):
    shown, drawn = [], volume_slices.segmentation
    monkeypatch.setattr(
        volume_slices,
        "segmentation",
        lambda looks, truth, predicted, **rest: shown.append(list(predicted)) or drawn(looks, truth, predicted, **rest),
    )
    pictures.draw(METHOD, site(masks=(3, 1)), tmp_path, CPU, arm="a", plan=PLAN)
    assert shown == [[1, 3, 0]]


def test_movements_are_told_in_millimetres():
    u = torch.zeros(3, *GRIDS[3])
    u[0], u[2] = 2.0, 1.0  # voxels of 1.5 and 4 mm
    sheet = volume_slices.field({0: torch.rand(GRIDS[3])}, {0: u}, (1.5, 2.0, 4.0))
    assert "test image 1\nslice 5 of 8\nmean 5.00 mm\nmost 5.00 mm" in words(sheet)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_moved_point_is_shown_where_it_went(dims):
    volume = torch.zeros(GRIDS[dims])
    start, move = (5, 4, 3)[:dims], (3, -2, 1)[:dims]
    volume[start] = 1
    moved = torch.zeros_like(volume)
    moved[start[0] + move[0], start[1] + move[1], *start[2:]] = 1  # within the slice
    u = torch.zeros(dims, *GRIDS[dims])
    u[:, *start] = torch.tensor(move, dtype=torch.float32)
    at = plane(volume, 3).nonzero()[0]
    shown = plane_moves(u, 3)[:, at[0], at[1]]
    assert (at + shown).tolist() == plane(moved, 3).nonzero()[0].tolist()


def test_volumes_are_shown_front_up_with_the_right_side_at_the_left():
    volume = torch.zeros(GRIDS[3])
    volume[-1, -1, 2] = 1  # RAS axes: the most right, the most anterior voxel
    assert plane(volume, 2).nonzero().tolist() == [[0, 0]]


def test_pixels_have_the_shape_of_voxels(tmp_path):
    square = volume_slices.fusion({0: torch.rand(3, 10, 10)}, {0: torch.rand(10, 10)}, MODALITIES, (2.0, 1.0))
    assert square.tall == pytest.approx(2 * 1.65)
    content = io.BytesIO(write_png(square.figure, tmp_path / "x.png").read_bytes())
    assert Image.open(content).height > 300
