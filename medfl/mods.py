"""What wraps every request at a site: it always answers, and an error's text never leaves."""

import logging
import uuid

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

from medfl.errors import InternalError, MedflError
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
    except MedflError as error:
        return _error_reply(message, error.exit_code, type(error).__name__, str(error))
    except MemoryError as error:
        return _error_reply(message, 30, type(error).__name__, str(error))
    except Exception as error:
        code = 30 if "out of memory" in str(error).lower() else InternalError.exit_code
        return _error_reply(message, code, type(error).__name__, str(error), error)


def _error_reply(message: Message, code: int, kind: str, text: str, error: Exception | None = None) -> Message:
    ticket = uuid.uuid4().hex[:12]
    log.error("%s: %s (ticket %s)", kind, text, ticket, exc_info=error)
    return Message(
        Error(code=SITE_ERROR + code, reason=f"{kind} (ticket {ticket} in the site's log)"), reply_to=message
    )
