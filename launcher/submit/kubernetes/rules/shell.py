"""Rules about what a shell would do to a RayJob's command line. Pure.

In K8sJobMode and SidecarMode the submitter's own shell reads entrypoint and runtime environment before Ray does.
"""

import shlex
from collections.abc import Iterator

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from launcher.submit.kubernetes.rules.read import RayObject, mapping

# Outside of quotes the shell acts on these; the backslash and quotes are followed below.
_LIVE = set("$`&|;<>()*?[]{}#~!\n")
_LIVE_IN_DOUBLE = set("$`")
_WITH_SHELL = ("K8sJobMode", "SidecarMode")


def _entrypoint(it: RayObject) -> Iterator[str]:
    text = it.spec.get("entrypoint")
    if it.mode == "InteractiveMode":
        return
    if not isinstance(text, str) or not text.strip():
        yield "spec.entrypoint is empty; give the command the driver runs"
        return
    if it.mode not in _WITH_SHELL:
        return  # HTTP hands the line as it is to the driver's own shell
    live = live_character(text)
    if live is not None:
        yield (
            f"spec.entrypoint holds {live!r} outside of single quotes, on which the submitter's shell acts in its own "
            "pod; write single-quoted words, sh -c '...' around a whole command line"
        )
    elif not _closes(text):
        yield "spec.entrypoint has a quote that is not closed; close it"


def live_character(text: str) -> str | None:
    """The first character a shell would act on; None when all words are plain or quoted."""
    quote = ""
    characters = iter(text)
    for character in characters:
        if quote:
            if character == quote:
                quote = ""
            elif quote == '"' and character == "\\":
                next(characters, None)
            elif quote == '"' and character in _LIVE_IN_DOUBLE:
                return character
        elif character in "'\"":
            quote = character
        elif character == "\\":
            next(characters, None)
        elif character in _LIVE:
            return character
    return None


def _closes(text: str) -> bool:
    try:
        shlex.split(text)
    except ValueError:
        return False
    return True


def _runtime_env(it: RayObject) -> Iterator[str]:
    text = it.spec.get("runtimeEnvYAML")
    if text is None:
        return
    try:
        value = YAML(typ="safe", pure=True).load(str(text))
    except YAMLError as error:
        yield f"spec.runtimeEnvYAML is not valid YAML ({' '.join(str(error).split())[:120]}); mend it"
        return
    if value is not None and not isinstance(value, dict):
        yield "spec.runtimeEnvYAML is no mapping; write keys such as working_dir and env_vars"
    elif it.mode in _WITH_SHELL:
        yield from _not_live("spec.runtimeEnvYAML", str(text))


def _metadata(it: RayObject) -> Iterator[str]:
    for key, value in mapping(it.spec, "metadata").items():
        if not isinstance(value, str):
            yield f"spec.metadata.{key} is {value!r}, which is no text; put it in quotes"
        elif it.mode in _WITH_SHELL:
            yield from _not_live(f"spec.metadata.{key}", value)


def _not_live(where: str, text: str) -> Iterator[str]:
    for character in sorted(_LIVE_IN_DOUBLE.intersection(text)):
        yield f"{where} holds {character!r}, which the submitter's shell would act on; write it without"


RULES = (_entrypoint, _runtime_env, _metadata)
