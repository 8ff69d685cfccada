"""Flower ServerApp: drives the study's stages. Logic lives in medfl."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from medfl import config, stages
from medfl.enrolment import Federation
from medfl.run_folder import RunFolder

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run `study` (resolved YAML): its `stages` (empty: all), once as many `sites` as named are there (0: unknown)."""
    asked = context.run_config
    study = config.parse(str(asked["study"]))
    named = tuple(str(asked.get("stages", "")).split(",")) if asked.get("stages") else study.stages
    folder = RunFolder.create(Path(study.run_dir), study.source, resume=True)
    stages.run(Federation(grid, study, folder), named, int(asked.get("sites", 0)))
