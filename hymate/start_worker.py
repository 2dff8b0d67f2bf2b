"""What starts each worker of a Ray of our own: Ray's own script imports all of Ray, only to set variables.

Run by Ray as a file, before each worker's process becomes itself, so it imports nothing of ours.
"""

import json
import os
import re
import sys

CONTEXT = "--serialized-runtime-env-context="
KNOWN = {"env_vars", "py_executable"}  # the rest is for containers, Java and conda


def main(arguments: list[str]) -> None:
    """Become the worker that Ray asks for, in the environment that Ray made for it."""
    context = json.loads(next(text[len(CONTEXT) :] for text in arguments if text.startswith(CONTEXT)))
    worker, *passed = [text for text in arguments if not text.startswith((CONTEXT, "--language="))]
    unknown = {name: value for name, value in context.items() if value and name not in KNOWN}
    assert not unknown, f"a worker that Ray starts otherwise: {unknown}"
    for name, value in context["env_vars"].items():
        os.environ[name] = re.sub(r"\$\{\w+\}", "", os.path.expandvars(value))  # what is not set, is empty
    os.execv(context["py_executable"], [context["py_executable"], worker, *passed])


if __name__ == "__main__":
    main(sys.argv[1:])
