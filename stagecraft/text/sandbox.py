"""Chat templates run in a process of their own: jinja's sandbox, in bounds that hold.

A template comes with a model from the internet and is a program. Its sandbox keeps it
from Python's insides, but not from a loop without end or a text without bounds, and a
thread that runs one cannot be stopped. So a child process renders, which the system
itself ends when a request takes too long or too much memory. It is started once for a
template, and once for each thread that renders, and answers line by line.

This file is also that child's program; it needs jinja2 and nothing of this package.
"""

import atexit
import datetime
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref

import jinja2
import jinja2.ext
import jinja2.sandbox

SECONDS = 10  # a request may take: thousands of times what one needs
MEMORY = 2 << 30  # bytes of address space a child may have
LARGEST = 20_000_000  # characters a request may write


class Failed(Exception):
    """A template that could not be rendered; the message says why, in one line.

    Attributes:
        always: whether other messages would not help.
    """

    def __init__(self, message, always):
        super().__init__(message)
        self.always = always


class Sandbox:
    """Renders templates in a child process.

    Args:
        sources: {name: jinja text}.
        moment: the time that templates read on the clock, in ISO format; "" for now.

    Raises:
        Failed: one of them is no template.
    """

    def __init__(self, sources, moment=""):
        self._start_message = {"sources": sources, "moment": moment}
        self._own = threading.local()  # its `child` is of one thread
        self.has_blocks = self._child().started["has_blocks"]

    def render(self, requests):
        """Returns the texts of several renderings, all at one moment in time.

        Args:
            requests: list of {"name", "variables", "opening", "closing"}: which
                template, its variables, and what to write around what stands in its
                {% generation %} blocks.

        Raises:
            Failed: a template refused, broke its bounds or is wrong.
        """
        return self._child().ask({"requests": requests})["texts"]

    def _child(self):
        # Another thread, or a process forked from this one, needs one of its own.
        child = getattr(self._own, "child", None)
        if child is None or child.owner != os.getpid() or child.ended:
            child = self._own.child = _Child(self._start_message)
        return child


class _Child:
    """A process that renders; it ends with the thread that has it, or this program.

    Attributes:
        owner: id of the process that started it.
        started: its answer to the templates.
        ended: whether it was stopped.
    """

    def __init__(self, start):
        self.owner, self.ended = os.getpid(), False
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(SECONDS), str(MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
        )
        _running.add(self)
        self.started = self.ask(start)

    def ask(self, question):
        """Returns the answer to a question; Failed where it is an error, or none."""
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.close()
            raise Failed(
                f"took more than {SECONDS} s or {MEMORY >> 30} GB and was stopped; is "
                "there a loop without end in it?",
                always=True,
            )
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"], answer["always"])
        return answer

    def close(self):
        """Ends the process, if it is this one's."""
        if not self.ended and self.owner == os.getpid():
            self._process.kill()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
        self.ended = True

    def __del__(self):
        self.close()


# Children to end with this program.
_running = weakref.WeakSet()


@atexit.register
def _end_children():
    for child in list(_running):
        child.close()


# -- the child -------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}: what the assistant itself says.

    The marks go into the text, so that they stay with the text, also when a macro or
    a {% set %} block carries it elsewhere.
    """

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        nodes = jinja2.nodes
        opening, closing = (
            nodes.Output([nodes.EnvironmentAttribute(name)]).set_lineno(line)
            for name in ("opening", "closing")
        )
        return [opening, nodes.Scope(body).set_lineno(line), closing]


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment transformers gives to chat templates."""

    opening = closing = ""

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self.moment, self.now = "", datetime.datetime.now()
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: self.now.strftime(form)

    def unsafe_undefined(self, obj, attribute):
        # By default it would be an empty text as long as nothing uses it.
        raise jinja2.sandbox.SecurityError(
            f"reaches for {attribute!r} of a {type(obj).__name__}"
        )


class _Refused(Exception):
    """A template called raise_exception."""


def _refuse(message):
    raise _Refused(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _answer(environment, templates, question):
    if "sources" in question:
        environment.moment, has_blocks = question["moment"], {}
        for name, source in question["sources"].items():
            tree = environment.parse(source)
            marks = tree.find_all(jinja2.nodes.EnvironmentAttribute)
            has_blocks[name] = any(mark.name == "opening" for mark in marks)
            templates[name] = environment.from_string(source)
        return {"has_blocks": has_blocks}
    environment.now = datetime.datetime.now()
    if environment.moment:
        environment.now = datetime.datetime.fromisoformat(environment.moment)
    texts = []
    for request in question["requests"]:
        environment.opening = request["opening"]
        environment.closing = request["closing"]
        parts, size = [], 0
        for part in templates[request["name"]].generate(**request["variables"]):
            size += len(part)
            if size > LARGEST:
                raise MemoryError(f"it wrote more than {LARGEST} characters")
            parts.append(part)
        texts.append("".join(parts))
    return {"texts": texts}


def _serve(seconds, memory):
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    environment, templates = _Environment(), {}
    for line in sys.stdin:
        # Unless it is taken back, the alarm ends this process, whatever it is doing.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            answer = _answer(environment, templates, json.loads(line))
        except _Refused as error:
            answer = {"error": f"refuses: {error}", "always": False}
        except jinja2.sandbox.SecurityError as error:
            answer = {"error": f"is not safe: it {error}", "always": True}
        except jinja2.TemplateSyntaxError as error:
            answer = {"error": f"line {error.lineno}: {error.message}", "always": True}
        except MemoryError as error:
            reason = f"needs too much memory ({error or 'it ran out'})"
            answer = {"error": reason, "always": True}
        except Exception as error:  # somebody else's program
            reason = f"failed ({type(error).__name__}: {error})"
            answer = {"error": reason, "always": False}
        if "error" in answer:
            answer["error"] = " ".join(answer["error"].split())[:500]
        text = json.dumps(answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(text, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))
