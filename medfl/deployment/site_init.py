"""A new site's folder: its settings with a comment for each, its keys, and the request that goes to the study lead."""

import csv
import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfl import PROTOCOL, __version__
from medfl.errors import ConfigError
from medfl.onsite.audit import Audit
from medfl.onsite.site_file import Limits, SiteFile, SitePolicy
from medfl.provision.documents import JoinRequest, check_line, check_site, now
from medfl.provision.keys import (
    load_signing_key,
    new_node_key,
    new_secret,
    new_signing_key,
    public_of,
    public_of_node,
    write_private,
    write_public,
)

COLUMNS = {  # key of a data set -> names of columns that mean it
    "image": ("image", "image_path", "path", "file", "filename", "file_name", "filepath"),
    "label": ("label", "class", "finding", "diagnosis", "target", "category"),
    "patient": ("patient", "patient_id", "patientid", "subject", "subject_id", "case", "case_id"),
    "split": ("split", "fold", "set", "partition"),
    "mask": ("mask", "mask_path", "segmentation", "seg", "label_map"),
}
NOT_SEEN = "no such column was seen: as the study says, until this line has a column's name or null"
RESERVED = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
TEMPLATE = """\
# What this site decides. Nothing that a study sends can change it. Check it with: medfl site check
site: {site}                      # its name in all studies
contact: {contact}                # who answers the study lead's questions
device: {device}                  # auto | cpu | cuda
threads: null                     # CPU threads; null: as the study says
port: {port}                      # between this site's two processes; never open to other machines

data:                             # the data sets that a study can be approved for
  default:                        # keys of the study's `data`: they replace the study's own
    root: {root}                  # folder with the images; nothing outside it is read
    datalist: {datalist}          # CSV file with a row per image, inside root or with its whole path
{columns}
policy:                           # what a study may ask; one that asks for more is refused
  methods: null                   # such as [medcss, simclr]; null: any method of the installed medfl
  stages: [{stages}]  # of a study
  least_images: {least_images}    # training images here; fewer, and an update could show single ones
  least_steps: {least_steps}      # optimizer steps in a round
  least_batch: {least_batch}      # images in a step
  most_bytes: {most_bytes}        # of one answer
  peers: null                     # under secure aggregation: other sites' signing keys, name: key; null: unchecked
  privacy: null                   # {{max_epsilon: 8.0}}: ask for differential privacy, and stop at this ε per patient

limits:                          # when this site helps itself
  hours: {hours}                  # of work on one request, then the node is started again
"""
COMMENTS = {
    "image": "column: path of the image, from root",
    "label": "column: class; empty cells are unknown. null: no labels",
    "patient": "column: patient; null: every image is its own patient",
    "split": "column: train | val | test; null: assigned by patient",
    "mask": "column: path of the label map, from root; null: none",
}


@dataclass(frozen=True)
class Answers:
    """What a site is asked when its folder is made."""

    name: str
    data: Path
    list: Path  # absolute, or inside `data`
    device: str
    contact: str


def defaults(folder: Path) -> Answers:
    """What is likely, found by looking at this machine."""
    name = re.sub(r"[^a-z0-9]+", "-", socket.gethostname().split(".")[0].lower()).strip("-")[:40] or "site"
    places = [place for place in (folder / "data", Path("data")) if place.is_dir()]
    data = places[0].absolute() if places else folder.absolute() / "data"
    return Answers(name, data, list_in(data), "auto", "")


def list_in(data: Path) -> Path:
    """The CSV file of a folder that is most likely its data list."""
    found = sorted(data.glob("*.csv")) if data.is_dir() else []
    named = [path for path in found if path.stem.lower() in ("datalist", "data_list", "list")]
    return Path((named or found or [Path("datalist.csv")])[0].name)


def columns_in(path: Path) -> dict[str, str]:
    """Key of a data set -> the column of a CSV file that means it; {} where there is no such file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    there = {column.strip().lower().replace(" ", "_"): column for column in header}
    found = {key: [there[name] for name in names if name in there] for key, names in COLUMNS.items()}
    return {key: names[0] for key, names in found.items() if names}


def create(folder: Path, answers: Answers) -> tuple[SiteFile, JoinRequest]:
    """Write the folder; keys that an interrupted attempt left are kept, and site.yaml is what makes it a site.

    Raises:
        CredentialError: a key that was left is damaged, or readable by others.
        ConfigError: a site is there already, or an answer cannot be used.
    """
    folder = folder.absolute()
    if (folder / "site.yaml").exists():
        raise ConfigError(f"{folder} is a site already, and is not overwritten. Choose another folder.")
    check_site(answers.name)
    check_line("contact", answers.contact)
    draft = SiteFile(folder / "site.yaml", answers.name, answers.contact, answers.device)
    for place in (folder, draft.keys, draft.state, draft.studies):
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o700)
    for make, path in (
        (new_node_key, draft.node_key),
        (new_signing_key, draft.signing_key),
        (new_secret, draft.secret),
    ):
        if not path.exists():
            make(path)
    key = load_signing_key(draft.signing_key)
    publics = {draft.node_key: public_of_node(draft.node_key), draft.signing_key: public_of(key)}
    for path, public in publics.items():
        write_public(path, public)
    request = JoinRequest(
        site=answers.name,
        contact=answers.contact,
        node_key=publics[draft.node_key],
        signing_key=publics[draft.signing_key],
        created=now(),
        medfl=__version__,
        protocol=PROTOCOL,
    )
    request.write(draft.request, key)
    write_private(draft.path, text_of(answers).encode())
    site = SiteFile.read(draft.path)
    Audit(site.audit).write("site made", site=site.site, medfl=__version__, request=request.digest)
    return site, request


def text_of(answers: Answers) -> str:
    """site.yaml with a comment for each key."""
    found = columns_in(answers.data / answers.list)
    if found.get("image") or not found:
        found = {"image": "image"} | found
    columns = [
        _line(f"    {key}: {_yaml(found[key])}", COMMENTS[key]) if key in found else _line(f"    # {key}:", NOT_SEEN)
        for key in COLUMNS
        if key in found or key in ("label", "patient", "split")
    ]
    policy = SitePolicy()
    filled: dict[str, Any] = {
        "site": answers.name,
        "contact": _yaml(answers.contact),
        "device": answers.device,
        "port": SiteFile.port,
        "root": _yaml(str(answers.data)),
        "datalist": _yaml(str(answers.list)),
        "columns": "\n".join([*columns, ""]),
        "stages": ", ".join(policy.stages),
        "hours": f"{Limits().hours:g}",
        **{name: getattr(policy, name) for name in ("least_images", "least_steps", "least_batch", "most_bytes")},
    }
    lines = TEMPLATE.format(**filled).splitlines()
    return "\n".join(_line(*map(str.rstrip, line.split(" # ", 1))) if " # " in line else line for line in lines) + "\n"


def _line(setting: str, comment: str) -> str:
    return f"{setting:<40} # {comment}"


def _yaml(text: str) -> str:
    """Text as a YAML value, in quotes where it could be read as something else."""
    plain = re.fullmatch(r"[A-Za-z/][A-Za-z0-9/._@-]*", text) and text.lower() not in RESERVED
    return text if plain else json.dumps(text)
