"""The researcher's commands: a federation on one machine, and everything that can be done with its run folder."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import yaml
from rich.console import Console

from medfl import config
from medfl.cli.main import run_argument
from medfl.cli.progress import Progress, sites_table, summary
from medfl.errors import ConfigError, one_of
from medfl.files import write_bytes
from medfl.run_folder import RunFolder
from medfl.study import Study

HYDRA_FLAGS = ("--multirun", "-m", "--info", "-i")


def simulate(words: Sequence[str]) -> None:
    """Pretrain over simulated hospitals, evaluate at each, and write the report.

    medfl simulate [key=value ...]           for example method=simclr data=medmnist data.name=adrenalmnist3d
    medfl simulate --cfg job                 print the resolved study, as it travels to the sites
    medfl simulate --cfg flwr                the same as a file for `flwr run -c`
    medfl simulate --multirun seed=0,1,2     one run after another
    """
    if any(word.split("=")[0] in HYDRA_FLAGS for word in words):
        _through_hydra(words)
        return
    if _wants_help(simulate, words):
        return
    if "--cfg" in words:
        _print_study(words)
        return
    study, resume = config.compose(words), _resumes(words)
    _run(study, study.stages, resume, command=f"medfl simulate {shlex.join(words)}".strip())


def evaluate(words: Sequence[str]) -> None:
    """Evaluate a run's encoders at every site: medfl evaluate RUN."""
    _rerun("evaluate", words, ("evaluate", "report"))


def transfer(words: Sequence[str]) -> None:
    """Cross-site transfer matrix of a run: medfl transfer RUN."""
    _rerun("transfer", words, ("evaluate", "transfer", "report"))


def report(words: Sequence[str]) -> None:
    """Write report.html anew from what a run folder holds: medfl report RUN."""
    if _wants_help(report, words):
        return
    from medfl.report.page import write

    folder = RunFolder.open(Path(run_argument("report", words)[0]))
    print(f"wrote {write(folder.path)}")


def export(words: Sequence[str]) -> None:
    """Check a run's encoder and copy it to a folder: medfl export RUN to=FOLDER [arm=federated]."""
    if _wants_help(export, words):
        return
    import torch

    from medfl.export import copy_encoder, load_encoder

    run, rest = run_argument("export", words)
    options = dict(word.split("=", 1) for word in rest if "=" in word)
    if "to" not in options or options.keys() - {"to", "arm"} or len(options) < len(rest):
        raise ConfigError("usage: medfl export RUN to=FOLDER [arm=federated|central|random|local:SITE]")
    source = RunFolder.open(Path(run)).arm(options.get("arm", "federated"))
    target = copy_encoder(source, Path(options["to"]))
    facts = json.loads((target / "encoder.json").read_text())
    shape = [facts["input"]["channels"], *[facts["input"]["size"]] * facts["input"]["spatial_dims"]]
    with torch.no_grad():
        width = load_encoder(target)(torch.zeros(1, *shape)).shape[1]
    print(f"wrote {target}/encoder.safetensors (SHA-256 {facts['sha256'][:16]}…): {shape} image → {width} features")
    print(f"use it:  from medfl.export import load_encoder; encoder = load_encoder(Path({str(target)!r}))")


def _rerun(name: str, words: Sequence[str], stages: Sequence[str]) -> None:
    if _wants_help(globals()[name], words):
        return
    run, rest = run_argument(name, words)
    if rest:
        raise ConfigError(f"medfl {name} takes the run's own study; got {rest[0]!r}. Give overrides to medfl simulate.")
    folder = RunFolder.open(Path(run))
    _run(config.parse(folder.config()), stages, True, command="")


def _run(study: Study, stages: Sequence[str], resume: bool, *, command: str) -> None:
    """Any stages of a simulated study, with progress and a summary."""
    from client.app import app as client
    from medfl.carriers import simulate as carry
    from medfl.cli.synthetic import progress_in, table
    from medfl.data.calibration import calibration
    from medfl.data.sites import describe
    from medfl.site_synthesis import read_record
    from medfl.training import Device
    from medfl.workshop import sites_of
    from server.app import app as server

    plan = study.training
    Device.choose(plan.device, plan.precision, plan.channels_last)  # refuse before anything is loaded or written
    console = Console(highlight=False)
    sites = sites_of(study)
    folder = RunFolder.create(Path(study.run_dir), study.source + _provenance(command), resume=resume)
    facts = describe(sites, calibration(sites, study.seed))
    write_bytes(folder.path / "sites.json", json.dumps(facts, indent=1).encode())
    console.print(sites_table(study, facts))
    # One node more than sites: the place with all data, where the central arm trains.
    asked: dict[str, str | int] = {"study": study.source, "stages": ",".join(stages), "sites": len(sites) + 1}
    with Progress(console, study, stages) as progress, RunFolder.watched(progress.show), progress_in(console):
        carry(server, client, asked, carrier=study.rounds.carrier, threads=plan.threads)
    if "synthesize" in stages:
        made = sorted((Path(study.state_dir) / "synthetic").glob("*/curation.json"))
        console.print(table([read_record(path.parent) for path in made]))
        console.print("  ".join(f"{path.parent}/contact_sheet.png" for path in made), soft_wrap=True)
    console.print(summary(folder))


def _provenance(command: str) -> str:
    packages = {name: version(name) for name in ("flwr", "torch", "monai", "hydra-core")}
    facts = {
        "provenance": {
            "medfl": version("medfl"),
            **packages,
            "python": platform.python_version(),
            "command": command,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    }
    return yaml.safe_dump(facts, sort_keys=False)


def _resumes(words: Sequence[str]) -> bool:
    return any(word == "resume=true" or word == "resume=True" for word in words)


def _wants_help(command: object, words: Sequence[str]) -> bool:
    if not {"-h", "--help"} & set(words):
        return False
    print((command.__doc__ or "").replace("\n    ", "\n"))
    if getattr(command, "__name__", "") == "simulate":
        _print_choices()
    return True


def _print_study(words: Sequence[str]) -> None:
    place = list(words).index("--cfg")
    kind, rest = " ".join(words[place + 1 : place + 2]), [*words[:place], *words[place + 2 :]]
    one_of("--cfg", kind, ("job", "flwr"))
    source = config.compose([word for word in rest if word != "--resolve"]).source
    print(source if kind == "job" else f"study = '''\n{source}'''\nsites = 0", end="" if kind == "job" else "\n")


def _print_choices() -> None:
    print("Choices:")
    for group in sorted(path for path in config.CONFIGS.iterdir() if path.is_dir() and list(path.glob("*.yaml"))):
        print(f"  {group.name:17} {' | '.join(sorted(path.stem for path in group.glob('*.yaml')))}")
    print(
        "\nAny key of the study can be set, such as rounds.count=10 training.optimizer.lr=3e-4; all of them: --cfg job"
    )


def _through_hydra(words: Sequence[str]) -> None:
    """--info and --multirun are Hydra's own; each job is the plain command in its own process."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    @hydra.main(version_base="1.3", config_path=str(config.CONFIGS), config_name="study")
    def job(_: object) -> None:
        command = [sys.executable, "-m", "medfl.cli.main", "simulate", *HydraConfig.get().overrides.task]
        if code := subprocess.run(command, check=False).returncode:  # noqa: S603
            raise SystemExit(code)

    sys.argv = ["medfl simulate", *words]
    job()
