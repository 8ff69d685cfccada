"""What wraps every request at a site: it always answers, and an error's text never leaves."""

import contextlib
import logging
import uuid

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

from medfl import admission
from medfl.errors import InternalError, MedflError, ResourceError, VersionError
from medfl.messages import SITE_ERROR

log = logging.getLogger("medfl.site")


def always_reply(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Turn any failure into an error code with a ticket; the text goes to the site's own log.

    A handler that gives no reply would block its node for ever, and Flower sends an exception's text, which can hold a
    path or a patient's identifier, to the server.
    """
    try:
        reply = call_next(message, context)
        if not isinstance(reply, Message):
            raise InternalError("the handler gave no reply.")
        return reply
    except Exception as error:
        return _error_reply(message, context, error)


def _error_reply(message: Message, context: Context, error: Exception) -> Message:
    kind, ticket = type(error).__name__, uuid.uuid4().hex[:12]
    known = isinstance(error, MedflError | MemoryError)
    log.error("%s: %s (ticket %s)", kind, error, ticket, exc_info=None if known else error)
    code = _code(error)
    with contextlib.suppress(Exception):  # a site whose own files are damaged answers all the same
        admission.refused(context, message.metadata.message_type, code, f"{kind}: {error}", ticket)
    said = f": {error}" if isinstance(error, VersionError) else ""  # names releases only
    reason = f"{kind} (ticket {ticket} in the site's log){said}"
    return Message(Error(code=SITE_ERROR + code, reason=reason), reply_to=message)


def _code(error: Exception) -> int:
    if isinstance(error, MedflError):
        return error.exit_code
    full = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
    return ResourceError.exit_code if full else InternalError.exit_code
