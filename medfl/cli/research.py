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
from typing import TYPE_CHECKING

import yaml
from rich.console import Console

from medfl import config
from medfl.cli.main import asks_help, run_argument
from medfl.cli.progress import Progress, sites_table, summary
from medfl.errors import ConfigError, one_of
from medfl.files import write_bytes
from medfl.run_folder import Event, RunFolder
from medfl.study import Study

if TYPE_CHECKING:
    from medfl.carriers import Host

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
    if asks_help(simulate, words):
        _print_choices()
        return
    if "--cfg" in words:
        _print_study(words)
        return
    study, resume = config.compose(words), _resumes(words)
    _run(study, study.stages, resume, command=f"medfl simulate {shlex.join(words)}".strip())


def finetune(words: Sequence[str]) -> None:
    """Train a run's encoders further with labels or masks, and evaluate: medfl finetune RUN.

    medfl finetune RUN                                             with the run's own settings
    medfl finetune RUN finetune.fractions=[0.1,1.0] run.dir=NEW    with others: a study of its own, in a new folder

    Any key of the study can be set; NEW takes the encoders of RUN as they are.
    """
    _rerun("finetune", words, ("finetune", "evaluate", "transfer", "report"))


def evaluate(words: Sequence[str]) -> None:
    """Evaluate a run's encoders at every site: medfl evaluate RUN [key=value ... run.dir=NEW]."""
    _rerun("evaluate", words, ("evaluate", "report"))


def transfer(words: Sequence[str]) -> None:
    """Cross-site transfer matrices of a run: medfl transfer RUN [key=value ... run.dir=NEW]."""
    _rerun("transfer", words, ("evaluate", "transfer", "report"))


def report(words: Sequence[str]) -> None:
    """Write report.html anew from what a run folder holds: medfl report RUN."""
    if asks_help(report, words):
        return
    from medfl.report.page import write

    folder = RunFolder.open(Path(run_argument("report", words)[0]))
    print(f"wrote {write(folder.path)}")


def _rerun(name: str, words: Sequence[str], stages: Sequence[str]) -> None:
    if asks_help(globals()[name], words):
        return
    run, rest = run_argument(name, words)
    folder = RunFolder.open(Path(run))
    if not rest:
        _run(config.parse(folder.config()), stages, True, command="")
        return
    if not any(word.startswith("run.dir=") for word in rest):
        raise ConfigError(f"got {rest[0]!r}: other settings make another study. Add run.dir=NEW, a new folder for it.")
    given = [word for word in rest if not word.startswith("resume=")]
    study = config.changed(folder.config(), ["run.state_dir=null", *given, f"run.encoders={folder.path}"])
    _run(study, ("pretrain", *stages), _resumes(rest), command=f"medfl {name} {shlex.join(words)}")


def _run(study: Study, stages: Sequence[str], resume: bool, *, command: str) -> None:
    """Any stages of a simulated study, with progress and a summary."""
    from client.app import app as client
    from medfl.carriers import simulate as carry
    from medfl.cli.synthetic import progress_in, table
    from medfl.data.calibration import calibration
    from medfl.data.sites import describe
    from medfl.site_synthesis import read_record
    from medfl.tracking import tracked
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
    with (
        tracked(folder, study, tensorboard=study.tensorboard, mlflow=study.mlflow),
        Progress(console, study) as progress,
        RunFolder.watched(progress.show),
        progress_in(console),
    ):
        host = _host(study, folder, console)
        carry(server, client, asked, carrier=study.rounds.carrier, threads=plan.threads, host=host)
    if "synthesize" in stages:
        made = sorted((Path(study.state_dir) / "synthetic").glob("*/curation.json"))
        console.print(table([read_record(path.parent) for path in made]))
        console.print("  ".join(f"{path.parent}/contact_sheet.png" for path in made), soft_wrap=True)
    console.print(summary(folder))


def _host(study: Study, folder: RunFolder, console: Console) -> "Host":
    """What the carrier may use of this machine; how many workers it takes is shown and written down."""
    from medfl.carriers import Host
    from medfl.training import Device

    def told(count: int, why: str) -> None:
        console.print(f"{count} worker{'s' if count > 1 else ''}: {why}")
        folder.write([Event("enrol", "", 0, "", "carrier/workers", float(count), why)])

    plan, workers = study.training, study.rounds.workers
    where = Device.choose(plan.device, plan.precision, plan.channels_last)
    count = workers if isinstance(workers, int) else None
    return Host(count, where.device.type == "cuda", study.rounds.ray_address, told)


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
