"""What S3's refusals and silences mean: boto3's errors as errors of the store, each in one line with the way out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any

from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ResponseStreamingError,
)

from moeflow.store.errors import StoreError, Unavailable

ABSENT = ("404", "NoSuchKey", "NotFound")
TAKEN = ("PreconditionFailed", "412")
BUSY = ("ConditionalRequestConflict", "409", "OperationAborted")
STRANGERS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired")
FORBIDDEN = ("AccessDenied", "403", "Forbidden", "AllAccessDisabled")
SKEWED = ("RequestTimeTooSkewed", "RequestExpired")
THROTTLED = ("SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded", "BandwidthLimitExceeded")
LATE = ("RequestTimeout", "RequestTimeoutException", "PriorRequestNotComplete")
FOR_EVER = (501, 505, 507)  # not implemented, and no room: waiting does not help
SILENT = (HTTPClientError, IncompleteReadError, ResponseStreamingError, MetadataRetrievalError, CredentialRetrievalError)
SKEW = 300.0  # seconds between two clocks; AWS refuses requests from 900 on


class Refused(Exception):
    """A conditional write was refused."""

    def __init__(self, code: str, asked_again: bool) -> None:
        super().__init__(code)
        self.code, self.asked_again = code, asked_again


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def said(where: str) -> Iterator[None]:
    """Turn boto3's errors into StoreError, Refused, or FileNotFoundError for a missing name, in one line about `where`.

    What may pass becomes Unavailable, which is a StoreError.
    """
    try:
        yield
    except ClientError as error:
        raise _answered(where, error) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise StoreError(
            f"{where}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a profile or a role"
        ) from error
    except S3UploadFailedError as error:
        cause = error.__context__
        if isinstance(cause, ClientError):
            raise _answered(where, cause) from error
        raise Unavailable(f"{where}: {str(error).splitlines()[0]}; run again") from error
    except BotoCoreError as error:
        kind = Unavailable if isinstance(error, SILENT) else StoreError
        raise kind(f"{where}: {str(error).splitlines()[0]}; check the endpoint and the network, then run again") from error


def _answered(where: str, error: ClientError) -> Exception:
    """The error that an answer of the server stands for."""
    code, message = code_of(error), error.response.get("Error", {}).get("Message", "")
    about: dict[str, Any] = dict(error.response.get("ResponseMetadata", {}))
    status = about.get("HTTPStatusCode", 0)
    bucket = where.removeprefix("s3://").partition("/")[0]
    if code == "NoSuchBucket" or (code == "404" and error.operation_name == "HeadBucket"):
        return StoreError(f"{where}: there is no bucket {bucket!r}; create it or name another in --store")
    if code in ABSENT:
        return FileNotFoundError(f"{where}: {message or code}")
    if code in TAKEN or code in BUSY:
        return Refused(code, about.get("RetryAttempts", 0) > 0)
    line = message.splitlines()[0] if message else str(status)
    if code in THROTTLED or code in LATE or status == 429 or (status >= 500 and status not in FOR_EVER):
        return Unavailable(f"{where}: {error.operation_name} failed with {code}: {line}; the server is busy or down, run again")
    refused = code in STRANGERS or code in FORBIDDEN or status == 403
    if code in SKEWED or (refused and abs(_skew(about)) > SKEW):
        behind = f"{abs(_skew(about)) / 60:.0f} minutes {'behind' if _skew(about) > 0 else 'ahead of'}"
        wrong = f"is {behind} the server's" if abs(_skew(about)) > 60 else "differs too much from the server's"
        return StoreError(
            f"{where}: this machine's clock {wrong}, so requests are refused ({code}); set it, and keep it right with NTP"
        )
    if code in STRANGERS:
        why = f"the credentials are not accepted ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the clock"
    elif refused:
        why = f"no permission for {error.operation_name} ({code}); grant read, write, list and delete on this prefix"
    elif status == 507:
        why = f"the server has no room left ({code}); free some, or name another store"
    else:
        advice = "if it lasts, check the server and the addressing= and checksum= options"
        why = f"{error.operation_name} failed with {code}: {line}; {advice}"
    return StoreError(f"{where}: {why}")


def _skew(about: dict[str, Any]) -> float:
    """Seconds that this machine's clock is behind the server's, by the date of its answer; 0 if that has none."""
    try:
        return parsedate_to_datetime(about["HTTPHeaders"]["date"]).timestamp() - time.time()
    except (KeyError, TypeError, ValueError):
        return 0.0
