"""What a hospital's commands print, in plain words."""

import base64
import shlex
import ssl
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfl.onsite.audit import Audit
from medfl.onsite.site_file import SiteFile
from medfl.provision.documents import Invitation, JoinRequest
from medfl.provision.keys import fingerprint

if TYPE_CHECKING:
    from medfl.deployment.review import Named, Review  # brings torch along, which status does without

WIDTH = 110
REQUESTS = {
    "query.describe": "numbers of images, and names of classes",
    "train.pretrain": "a round of pretraining",
    "train.finetune": "a round of fine-tuning",
    "query.refresh": "sums under given weights",
    "query.codebook": "centres for the first codebook",
    "query.keys": "public keys for one sum over the sites",
    "query.shares": "shares of secrets, each sealed for one other site",
    "query.unmask": "shares that lift the masks of the sum, and of no single site",
    "evaluate.probe": "scores on this site's test images",
    "train.synthesize": "counts of synthetic images, which stay here",
}
ROLES = {  # what may leave -> its column, and what it is
    "parameter": ("weights", "what the network has learnt: its trained weights"),
    "norm_moments": (
        "norm sums",
        "for each channel of a normalisation layer: count, sum, sum of squares, of many images",
    ),
    "codebook": ("code sums", "for each code that enough images use: count and sum over many images"),
    "target": ("slow copy", "weights of the slow copy that sets the training target"),
    "statistics": ("other sums", "sums over many images: products of features, counts of predictions for curves"),
    "masked": ("masked", "weights and sums as whole numbers under masks, which only the sum over the sites is free of"),
    "key": ("keys", "public keys of one sum"),
    "share": ("shares", "shares of the secrets behind the masks"),
    "metric": ("numbers", "losses, scores and counts from a fixed list of names, 8 bytes each"),
}
HALVES = "rounded to 16 bits ({}), and packed without loss, so that fewer bytes leave than are said here"
WIRE = {  # rounds.wire -> what happens to the weights in answers to training
    "bf16": HALVES.format("bf16"),
    "fp16": HALVES.format("fp16"),
    "int8": "rounded to 8 bits, with one scale for each 256 of them (int8)",
    "topk": "left out but for the largest changes and their places (topk)",
}
FACTS = {  # what leaves in words, with the numbers of images
    "held_out": "whether this site is kept out of training",
    "owners": "training images for each part of the network that not all sites have",
    "classes": "names of classes, as this site's list of images has them",
    "findings": "names of findings, as this site's list of images has them",
}
STAYS = (
    "images, masks, labels and predictions of single patients",
    "file names, folders, DICOM tags, patient and study numbers",
    "texts of errors (an error leaves as a code and a ticket number)",
    "the optimizer's state and all that is kept between rounds",
)
KEPT = {
    "local": "kept back by the study: normalisation statistics, heads, counters",
    "queue": "features of single patients",
}


def made(site: SiteFile, request: JoinRequest, where: str) -> str:
    """After init."""
    print_ = fingerprint(request.canonical())
    return (
        f"made {site.folder}: settings in site.yaml, keys in keys/ (they never leave this machine).\n"
        f"fingerprint of the request, to compare by phone:  {print_}\n"
        f"next: look through {site.path}, send {site.request} to the study lead (it holds no secret), "
        f"and run: medfl site check --offline{where}"
    )


def key_of(invitation: Invitation) -> str:
    """The study lead's key, to compare by phone."""
    return fingerprint(base64.b64decode(invitation.study_key))


def authority_of(invitation: Invitation) -> str:
    """The study's certificate authority, to compare by phone."""
    return fingerprint(ssl.PEM_cert_to_DER_cert(invitation.authority))


def review(site: SiteFile, invitation: Invitation, page: "Review", given: str, where: str) -> str:
    """One page for the people who decide; `given`: the file that was named, `where`: what the next command needs."""
    parts = [
        ("The study", _study(invitation, page)),
        ("What runs here", _runs(page)),
        ("What leaves this site", _leaves(page)),
        ("What never leaves", _stays(page)),
        ("What protects a single patient", _protects(page)),
        ("For how long", [f"Until {page.until}, or until you stop it: medfl site stop. Rounds: {page.rounds}."]),
        ("What this site's policy says", _policy(site, page)),
    ]
    lines = [f"{page.name}: review of the study at {site.site}", ""]
    for title, body in parts:
        lines += [title.upper(), *(_wrapped(line) for line in body), ""]
    if not page.refused:
        file = given if Path(given).is_file() else "INVITATION"
        lines.append(f"next: medfl site approve {shlex.quote(file)} --by NAME{where}")
    return "\n".join(lines)


def _study(invitation: Invitation, page: "Review") -> list[str]:
    return [
        f"{page.name} ({page.study_id}), invited on {page.created[:10]}.",
        f"To compare by phone: the study lead's key  {key_of(invitation)}",
        f"              and its certificate authority  {authority_of(invitation)}",
        f"This site would connect to {page.address} and to nothing else. Nobody connects to this site.",
    ]


def _runs(page: "Review") -> list[str]:
    same = (
        f"The program is medfl {page.medfl}, byte for byte the release that is installed here."
        if not page.changed
        else f"CAUTION: the program says it is medfl {page.medfl}, but {len(page.changed)} of its files are not those "
        f"installed here: {', '.join(page.changed[:5])}{' ...' if len(page.changed) > 5 else ''}. Install the study "
        "lead's release, or have these files read by someone who can."
    )
    return [
        same,
        f"Method {page.method} with {page.parameters:,} weights. Stages: {', '.join(page.stages)}.",
        f"Pretraining: {page.rounds} rounds, each of {page.steps} steps of {page.batch} images.",
        "It reads the data set that you name in the approval, and writes only below this site's state folder.",
    ]


def _leaves(page: "Review") -> list[str]:
    roles = list(dict.fromkeys(role for row in page.asked for role in row.bytes))
    heads = "".join(f"{ROLES[role][0]:>12}" for role in roles)
    lines = [f"   answers   {'':40}{heads}"]
    for row in page.asked:
        cells = "".join(f"{_size(row.bytes[role]) if role in row.bytes else '-':>12}" for role in roles)
        lines.append(f"   {row.times:>7} x {REQUESTS.get(row.request, row.request):40}{cells}")
    lines += [f"- {': '.join(ROLES[role])}" for role in roles]
    lines += [_named(row) for row in page.named]
    if page.wire in WIRE:
        text = f"Weights leave training compressed, as changes to the ones that came: {WIRE[page.wire]}."
        lines.append(f"{text} What int8 and topk leave out stays here and is added to the next round's change.")
    pretraining = [row for row in page.asked if row.request == "train.pretrain"]
    if per_round := sum(sum(row.bytes.values()) for row in pretraining):
        lines.append(f"Each round of pretraining: {_size(per_round)} ({per_round:,} bytes) at most.")
    lines.append(f"In total about {_size(page.total)} ({page.total:,} bytes), if every stage runs once.")
    if page.assumed:
        lines.append(f"Assumed here: {page.assumed}. More of them make the counts behind scores larger.")
    if "transfer" in page.stages:
        lines.append("For transfer each other site's encoder is scored here too: once more for each other site.")
    return lines


def _named(row: "Named") -> str:
    """Which texts of the list of images leave as names, and who chose them."""
    if row.key == "labels":
        what = f"names of findings: of the columns {', '.join(row.texts)}"
    elif row.key == "classes":
        what = f"names of classes: {', '.join(row.texts)}"
    else:
        what = f"names of classes: every different text in the column {row.texts[0]!r} of its list"
    if row.own:
        return f"In words, from data set {row.data!r}: {what}, as site.yaml says."
    return (
        f"CAUTION: in words, from data set {row.data!r}: {what}. The study chose it, site.yaml does not say. Look at "
        f"what is in there, and set data.{row.data}.{row.key} in site.yaml (null: none)."
    )


def _stays(page: "Review") -> list[str]:
    kept = [f"{count} tensors: {KEPT[role]}" for role, count in page.private.items()]
    return [f"- {text}" for text in (*STAYS, *kept)]


def _protects(page: "Review") -> list[str]:
    privacy = page.privacy
    if privacy["mechanism"] == "none":
        return [
            "No differential privacy. Updates are limited in size and made of many steps and images, but they can "
            "carry traces of single training images."
        ]
    unit = "each patient's" if privacy["mechanism"] == "patient" else f"a bucket of about {privacy['bucket']} patients'"
    limit = privacy["max_epsilon"]
    ends = f"This site stops at ε={limit:g} per patient." if limit else "Nobody set a limit for ε."
    return [
        f"Differential privacy: {unit} part in a step is cut to length {privacy['clip']:g}, and noise of "
        f"{privacy['noise']:g} times that is added here, before anything leaves. {ends}",
        "medfl site check says what ε the whole study comes to with this site's number of patients, and whether that "
        "protects anybody; medfl site privacy says what is spent. Scores and counts of test images are not covered.",
    ]


def privacy(facts: dict[str, Any]) -> str:
    """What was spent."""
    if not facts["releases"]:
        return "nothing was released under differential privacy yet."
    lines = [f"{'study':24} {'phase':12} {'arm':28} {'rounds':>6} {'steps':>8} {'noise':>6} {'rate':>6}"]
    lines += [
        f"{row['study'][:24]:24} {row['phase'][:12]:12} {row['arm'][:28]:28} {row['rounds']:>6} {row['steps']:>8} "
        f"{row['noise']:>6.3g} {row['rate']:>6.3f}"
        for row in facts["rows"]
    ]
    limit = f" of {facts['max_epsilon']:g} that policy.privacy allows" if facts["max_epsilon"] else ""
    return "\n".join([
        *lines,
        f"spent: ε={facts['epsilon']:.3g}{limit}, at δ={facts['delta']:.1e} (RDP {facts['rdp']:.3g}; of two",
        "accountants' bounds the smaller one counts). Unit: " + facts["unit"] + ".",
        f"ledger head: {facts['head']}",
    ])  # fmt: skip


def _policy(site: SiteFile, page: "Review") -> list[str]:
    if page.refused:
        return ["REFUSED, it cannot be approved:", *(f"- {reason}" for reason in page.refused)]
    rules = site.policy
    return [
        f"Allowed. site.yaml asks for at least {rules.least_images} training images here, {rules.least_steps} steps a "
        f"round and {rules.least_batch} images a step, and for answers of at most {_size(rules.most_bytes)}; the "
        f"largest has {_size(page.largest)}. This is checked again with every request, before anything runs."
    ]


def status(facts: dict[str, Any]) -> str:
    """The site's state."""
    lines = [f"site {facts['site']}"]
    for study in facts["studies"]:
        since = f" since {study['since']}" if study["connected"] else ""
        lines.append(f"{study['name'] or study['study']} ({study['study']}): {study['state']}{since}")
        if study["problem"]:
            lines.append(f"  PROBLEM: {study['problem']}")
        last = study["last_answer"]
        said = f"round {last['round']} of {last['stage']} ({last['arm']}) on {last['t'][:19]}" if last else "none yet"
        lines.append(
            f"  last answer: {said}; {_size(study['bytes_sent'])} sent in all; approved until {study['until']}"
        )
    if now := facts["working_on"]:
        lines.append(f"working on {REQUESTS.get(now['kind'], now['kind'])}, round {now['round']}, since {now['since']}")
    lines += [f"  {entry['t'][:19]}  {_entry(entry)}" for entry in facts["audit"]["last"]]
    return "\n".join([*lines, f"audit head: {facts['audit']['head']}", f"next: {facts['next']}"])


def _entry(entry: dict[str, Any]) -> str:
    known = ("study", "stage", "arm", "round", "bytes", "by", "data", "reason", "code", "ticket")
    rest = " ".join(f"{key}={entry[key]}" for key in known if entry.get(key) not in (None, ""))
    return f"{entry['what']}  {rest}".rstrip()[:WIDTH]


def egress(facts: dict[str, Any]) -> str:
    """The table of all that left."""
    if not facts["answers"]:
        return "nothing has left yet."
    lines = [f"{'when (UTC)':19}  {'request':10} {'arm':14} {'round':>5} {'tensors':>7} {'numbers':>7} {'bytes':>13}"]
    lines += [
        f"{row['time'][:19]}  {row['stage'] or '':10.10} {row['arm'] or '':14.14} {row['round'] or 0:>5} "
        f"{row['tensors']:>7} {row['metrics']:>7} {row['bytes']:>13,}"
        for row in facts["answers"]
    ]
    lines.append(f"{len(facts['answers'])} answers, {facts['bytes']:,} bytes ({_size(facts['bytes'])}):")
    lines += [f"  {size:>13,}  {': '.join(ROLES.get(role, (role,)))}" for role, size in facts["roles"].items()]
    names = sorted({name.split("/")[0] for name in facts["metrics"]})
    lines.append(f"  numbers of these kinds: {', '.join(names)} (all names: --json)")
    for name, values in facts["facts"].items():
        said = (", ".join(value) if isinstance(value, list) else str(value) for value in values)
        lines += [f"  {FACTS.get(name, name)}: {text}" for text in said]
    return "\n".join(lines)


def whole(path: Path) -> str:
    """After audit verify."""
    number, digest = Audit(path).head()
    cut = sum(entry["what"] == "recovered" for entry in Audit(path).entries())
    noted = f" {cut} lines were cut short by a crash, and are noted as such." if cut else ""
    return (
        f"{path} is whole: {number} lines.{noted}\nhead: {number}:{digest}\n"
        "Lines cut off at the end cannot be seen from here: compare the head that the study lead noted with --head."
    )


def _size(count: int) -> str:
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.3g} {unit}"
    return f"{count} bytes"


def _wrapped(line: str) -> str:
    if line.startswith("   "):  # of a table
        return line.rstrip()
    hang = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="  " + hang, break_long_words=False)
