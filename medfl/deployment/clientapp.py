"""The program that a site's SuperExec starts in place of `flwr-clientapp`: one process for each request.

It lets Flower fetch the request and send the answer. The app that runs is the reviewed one in the study's read-only
folder; the bundle that came is only compared with it. Any other program that was asked for is refused.
"""

import faulthandler
import hashlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from flwr.app import Message

from medfl.deployment import site_watch
from medfl.deployment.site_processes import SITE_FILE, STUDY
from medfl.errors import ConfigError, MedflError, PolicyError
from medfl.flower_compat import run_client_app, task_commands
from medfl.onsite.approvals import app_folder, approval_of
from medfl.onsite.audit import Audit
from medfl.onsite.site_file import SiteFile

REFUSED, OUT_OF_TIME = 1, 30  # exit status
log = logging.getLogger("medfl.site")


class Gatekeeper:
    """This site's side of one request: what is being worked on, and whether the app may run."""

    def __init__(self, site: SiteFile, study_id: str) -> None:
        self.site, self.study_id = site, study_id

    def begun(self, message: Message) -> None:
        """Leave a note for the watchdog, and for `medfl site status`; from here on the time is limited."""
        about, limit = message.metadata, self.site.limits.hours * 3600
        site_watch.work_on(self.site, about.message_id, about.message_type, about.group_id)
        clock = threading.Timer(min(limit, threading.TIMEOUT_MAX), self.out_of_time, [about.message_type])
        clock.daemon = True
        clock.start()
        faulthandler.dump_traceback_later(limit + site_watch.LATE, exit=True)  # where even Python hangs

    def admitted(self, bundle: bytes) -> Path:
        """The folder of the approved app.

        Raises:
            PolicyError: this is not its bundle, the study is not approved, or neither can be found out; the text, which
                may leave the site, is fixed.
        """
        try:
            return self._approved(bundle)
        except PolicyError:
            raise
        except Exception:  # Flower would send its text, and a full disk's error names a path
            log.exception("the bundle cannot be compared")
            raise PolicyError("this site could not compare the app bundle. Its log says why.") from None

    def _approved(self, bundle: bytes) -> Path:
        """The folder of the approved app; every PolicyError of it has a fixed text."""
        audit, got = Audit(self.site.audit), hashlib.sha256(bundle).hexdigest()
        try:
            approval, _ = approval_of(self.site, self.study_id)
            folder = app_folder(self.site.study(self.study_id)).absolute()
        except MedflError as error:
            log.error("%s", error)
            audit.write("study refused", study=self.study_id, bundle=got, reason=str(error))
            raise PolicyError("this site has no valid approval of the study.") from None
        if got != approval.app:
            log.error("the bundle %s is not the approved %s", got, approval.app)
            audit.write("bundle refused", study=self.study_id, bundle=got, approved=approval.app)
            raise PolicyError("the app bundle is not the one that this site approved.")
        return folder

    def answered(self) -> None:
        """Nothing is left to watch."""
        site_watch.done(self.site)

    def out_of_time(self, kind: str) -> None:
        """End this process; Flower's node then answers for it, with an error."""
        text = f"longer than limits.hours={self.site.limits.hours:g}"
        log.error("the request %s takes %s", kind, text)
        try:
            Audit(self.site.audit).write("request ended", study=self.study_id, request=kind, reason=text)
            site_watch.done(self.site)
        finally:
            os._exit(OUT_OF_TIME)


def main(words: Sequence[str]) -> None:
    """`words`: the name of the program that was asked for, and its arguments."""
    _log_to_stderr()
    site, study_id = SiteFile.read(Path(_told(SITE_FILE))), _told(STUDY)
    if not task_commands().get(words[0] if words else "", False):
        asked = (words[0] if words else "")[:80]
        Audit(site.audit).write("task refused", study=study_id, program=asked)
        log.error("%r was asked for; this site runs ClientApps only", asked)
        raise SystemExit(REFUSED)
    run_client_app(words[1:], Gatekeeper(site, study_id))


def _log_to_stderr() -> None:
    """medfl's own lines; Flower writes its own."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    logging.getLogger("medfl").addHandler(handler)


def _told(name: str) -> str:
    if name not in os.environ:
        raise ConfigError(f"{name} is not set. This program is started by: medfl site serve apps")
    return os.environ[name]


def run(words: Sequence[str]) -> None:
    """`main` as a program: a known error is a line and an exit code."""
    try:
        main(words)
    except MedflError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run(sys.argv[1:])
