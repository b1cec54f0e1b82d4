"""A script of its own: renders a chat template in a process that may use little time and memory.

stdin: one JSON object with "path" (sys.path), "seconds", "bytes", "template", "options" and "renders", a list of
[messages, add_generation_prompt]. stdout: the number of characters of the longest text, "memory" where it does not fit.
Nothing of ours and nothing heavy is imported, so that it starts in a tenth of a second.
"""

import json
import sys
from datetime import datetime
from typing import Any


def limit(seconds: int, size: int) -> None:
    """Bound what this process may use; where there are no limits (Windows), the caller's clock is all there is."""
    try:
        import resource
    except ImportError:
        return
    for kind, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, size), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # a system that has the name alone
            continue


def compiled(template: str) -> Any:
    """The template in a sandbox with the names that transformers gives it."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks text and changes none of it."""

        tags = {"generation"}  # noqa: RUF012 as jinja declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def main() -> None:
    job = json.load(sys.stdin)
    sys.path[:] = job["path"]
    limit(job["seconds"], job["bytes"])
    try:
        template = compiled(job["template"])
        longest = 0
        for messages, prompt in job["renders"]:
            text = template.render(messages=messages, add_generation_prompt=prompt, **job["options"])
            longest = max(longest, len(text))
        print(longest)
    except MemoryError:
        print("memory")
    except Exception:  # the caller renders it too, and says what is wrong
        print(0)


if __name__ == "__main__":
    main()
