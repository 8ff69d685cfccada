"""Flower ServerApp: drives the study's stages. Logic lives in medfl."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from medfl import config, stages
from medfl.enrolment import Federation
from medfl.errors import ConfigError
from medfl.malloc import keep_freed
from medfl.run_folder import RunFolder
from medfl.server_seals import Seals

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run `study` (resolved YAML): its `stages` (empty: all), once as many `sites` as named are there (0: unknown).

    With a `root`, the folder of a coordinator, orders and answers are sealed, and the run is kept in it.
    """
    keep_freed()
    asked = context.run_config
    study, root = config.parse(str(asked["study"])), str(asked.get("root", ""))
    named = tuple(str(asked.get("stages", "")).split(",")) if asked.get("stages") else study.stages
    if root and (more := [name for name in named if name not in study.stages]):
        raise ConfigError(f"stages: the approved study has no {more[0]!r}, only {', '.join(study.stages)}.")
    folder = RunFolder.create(Path(root) / study.run_dir, study.source, resume=True)
    seals = Seals.of(Path(root)) if root else None
    with folder.attempt(str(context.run_id)):
        stages.run(Federation(grid, study, folder, seals=seals), named, int(asked.get("sites", 0)))
