"""Names of places for data and runs: local paths and URLs. Only the text is checked; no file is opened."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

from hymate.errors import UserError

CREDENTIAL = re.compile(
    r"\w://[^@\s]*:[^@\s]*@"  # a URL's user:password@
    r"|[?&][^=&\s]*(password|secret|token|credential|signature|(_|access|api)key)[^=&\s]*="  # or its query
    r"|\b(AKIA|ASIA)[A-Z0-9]{16}\b",  # an access key of AWS
    re.IGNORECASE,
)
CREDENTIAL_REFUSED = (
    "holds a credential, which the run's files would keep: leave it out and give it by the environment "
    "(for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE) or by the machine's role"
)

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # the last: bytes of a command line that are not UTF-8
SCHEMES = {  # what stands between a URL's slashes
    "file": "",
    **dict.fromkeys(("s3", "gs", "gcs"), "BUCKET"),
    **dict.fromkeys(("abfs", "abfss"), "CONTAINER@ACCOUNT.dfs.core.windows.net"),
    **dict.fromkeys(("hdfs", "viewfs"), "HOST"),
}
_URL = re.compile(r"(\s*[A-Za-z][A-Za-z0-9+.-]*):(//)?([^/?]*)(/[^?]*)?(\?.*)?")
_OPTIONS = re.compile(r"\?\w+=[^&?#]*(&\w+=[^&?#]*)*")


class Url(NamedTuple):
    """A URL's storage, its options (what follows the question mark) and the path in it."""

    root: str
    options: str
    relative: PurePosixPath


def parse_place(text: str) -> Path | Url:
    """The place that a text names, without a look at its storage.

    A local path stays as it is, but for a ~ at its beginning, the home folder. In a URL a # is part of a name, and a ?
    begins the storage's options; a %20 is a space in file:// alone.

    >>> parse_place("s3://bucket/exp#1/data").relative
    PurePosixPath('exp#1/data')

    Raises UserError where it names none: an empty text, half a URL, a name that is too long or odd.
    """
    if "://" in text and CREDENTIAL.search(text):
        raise UserError(f"{text.partition('://')[0]}://... {CREDENTIAL_REFUSED}")
    if not text:
        raise UserError("it is empty: give a folder, a file or a URL; . is the current folder")
    if UNPRINTABLE.search(text):
        raise UserError(f"{text!a} holds a control character, or is not UTF-8: rename what it names")
    if any(len(name.encode()) > 255 for name in text.split("/")):
        raise UserError(f"{text}: a name in it is longer than the 255 bytes that file systems keep")
    url = _URL.fullmatch(text)
    if url is not None:
        scheme, slashes, authority, path, _ = url.groups()
        # C:/data is none, nor is host:5000
        if scheme.strip().lower() in SCHEMES or (len(scheme) > 1 and (slashes or (path and not authority))):
            return _parse_url(*url.groups(default=""))
    local = os.path.expanduser(text)
    if local.startswith("~"):
        raise UserError(f"{text}: there is no such home folder; a name that begins with ~ is written ./{text}")
    return Path(local)


def _parse_url(scheme: str, slashes: str, authority: str, path: str, options: str) -> Path | Url:
    text = f"{scheme}:{slashes}{authority}{path}{options}"
    kind = scheme.strip().lower()
    root = f"{scheme}:{slashes}{authority}"
    if kind not in SCHEMES:
        raise UserError(f"{root}: not a storage that can be used: give a local path, or a URL of {', '.join(SCHEMES)}")
    named = re.fullmatch(r"[\w.:@-]+", authority) if kind != "file" else path and authority in ("", "localhost")
    if not (scheme == kind and slashes and named):
        raise UserError(f"{text}: write {kind}://{SCHEMES[kind]}/FOLDER, or ./{text} for a local path of that name")
    if ".." in path.split("/"):
        raise UserError(f"{text}: a URL can't go up: write it without ..")
    if "#" in options:
        raise UserError(f"{text}: the options after the ? cannot hold a #: leave it and what follows it out")
    if options and (kind == "file" or not _OPTIONS.fullmatch(options)):
        raise UserError(
            f"{text}: a ? in a URL begins the storage's options, NAME=VALUE, and file:// has none: rename what has a ? "
            "in its name"
        )
    if kind == "file":
        local = unquote(path, errors="surrogateescape")
        if UNPRINTABLE.search(local):
            raise UserError(f"{text} holds a control character, or is not UTF-8: rename what it names")
        return Path(local)
    return Url(root, options[1:], PurePosixPath(path.strip("/")))
