"""The labelling page and what it asks for; run by `stagecraft label`."""

import hmac
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import jax

from stagecraft import schema, stores
from stagecraft.anatomy import behaviour
from stagecraft.data import readers, stage_data
from stagecraft.errors import UserError
from stagecraft.run import open_run
from stagecraft.serve import agreement_report, label_records, labelling, listening
from stagecraft.serve import items as label_items

_NAME = 60  # characters of a rater's name
_STATIC = {"/label.js": "text/javascript", "/label.css": "text/css"}


def label(
    root: Path,
    stage: str,
    *,
    prompts: str = "",
    pairs: str = "",
    count: int = 200,
    answers: int = 2,
    repeats: float = 0.1,
    seed: int = 0,
    sampling: dict[str, Any],
    host: str = "127.0.0.1",
    port: int = 0,
) -> None:
    """Serves the labelling of a stage's answers, or of pairs in files.

    Args:
        root: the work directory; all is kept in its labels/STAGE.
        stage: a finished stage that writes text; with `pairs` any name.
        prompts: files of prompts; "" for those of the run's world.
        pairs: files of pairs, or "".
        count: prompts to answer.
        answers: to each prompt; more than two are ranked.
        repeats, seed: see `labelling.schedule`.
        sampling: fields of `sampling.SamplingParams`.
        host, port: see `serve`.
    """
    listening.check("label")
    root = stores.local(root)
    folder = root / stage_data.LABELS / stage
    generator = ""
    if pairs:
        items = label_items.read(pairs)
    else:
        run = open_run(root)
        speaking = behaviour.speaking_stages(run)
        if stage not in speaking:
            raise UserError(
                f"--stage={stage}: {schema.hint(stage, speaking)}expected a finished "
                f"stage that writes text: {', '.join(speaking) or 'there is none yet'}"
            )
        if not prompts and not run.config.world.name:
            raise UserError(
                "--prompts is missing: files of the prompts to answer, each line "
                'like {"prompt": "..."}'
            )
        spec = prompts or stage_data.locate("world:prompts.jsonl", root)
        asked = [one.prompt for one in readers.prompts(spec)]
        with jax.set_mesh(run.mesh()):
            how = dict(count=count, answers=answers, seed=seed, settings=sampling)
            items = label_items.sample(run, stage, asked, folder, **how)
        generator = run.source(stage).id()
    given = labelling.Labelling(
        folder, items, seed=seed, repeats=repeats, generator=generator
    )
    try:
        serve(given, host=host, port=port)
    finally:
        given.close()


def app(given: labelling.Labelling, *, token: str, hosts, port):
    """Returns the ASGI application.

    Args:
        given: the `labelling.Labelling` that verdicts go to.
        token: what opens a session.
        hosts, port: see `guard.Guard`.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    from stagecraft.serve import guard

    def file(name, kind):
        async def send(request):
            return Response(_text(name), media_type=kind)

        return send

    async def body(request):
        try:
            value = await request.json()
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UserError("expected a JSON object")
        return value

    async def session(request):
        value = await body(request)
        if not hmac.compare_digest(str(value.get("token")), token):
            raise UserError("the token is another one: open the address again")
        response = JSONResponse({})
        response.set_cookie(
            guard.cookie(port), token, httponly=True, samesite="strict", path="/"
        )
        return response

    def state(rater, place_and_showing):
        done, total = given.progress(rater)
        out = {"done": done, "total": total, "place": None}
        if place_and_showing is not None:
            place, showing = place_and_showing
            out |= {"place": place} | labelling.as_json(
                given.items[showing.item], showing
            )
        else:
            label_records.write(given)
        return JSONResponse(out)

    async def next_(request):
        rater, tab = _names(await body(request))
        return state(rater, given.next(rater, tab))

    async def verdict(request):
        value = await body(request)
        rater, tab = _names(value)
        keys = ("strength", "order", "reason", "seconds")
        more = {key: value.get(key) for key in keys}
        given.say(rater, value.get("place"), value.get("choice"), **more)
        return state(rater, given.next(rater, tab))

    async def undo(request):
        rater, tab = _names(await body(request))
        return state(rater, given.undo(rater, tab) or given.next(rater, tab))

    async def report(request):
        return JSONResponse(agreement_report.measure(given))

    async def refused(request, error):
        return JSONResponse({"error": str(error)}, 400)

    async def written(request, error):
        text = f"{given.folder}: cannot write here ({error.strerror}); free space"
        return JSONResponse({"error": text}, 507)

    pages = [Route("/", file("label.html", "text/html"))]
    pages += [Route(path, file(path[1:], kind)) for path, kind in _STATIC.items()]
    calls = [
        Route(path, call, methods=["POST"])
        for path, call in (
            ("/session", session),
            ("/next", next_),
            ("/verdict", verdict),
            ("/undo", undo),
        )
    ]
    settings = dict(token=token, hosts=hosts, port=port)
    settings["open_paths"] = ("/", "/session", *_STATIC)
    return Starlette(
        routes=[*pages, *calls, Route("/report.json", report)],
        middleware=[Middleware(guard.Guard, **settings)],
        exception_handlers={UserError: refused, OSError: written},
    )


def _text(name):
    return resources.files("stagecraft.serve").joinpath(name).read_text("utf-8")


def _names(value):
    rater, tab = value.get("rater"), value.get("tab")
    for what, name in (("rater", rater), ("tab", tab)):
        if not isinstance(name, str) or not name.strip() or len(name) > _NAME:
            raise UserError(f"{what}: expected a name of 1 to {_NAME} characters")
    return rater.strip(), tab.strip()


def serve(
    given: labelling.Labelling, *, host: str = "127.0.0.1", port: int = 0
) -> None:
    """Serves the page until it is stopped, then writes the records and a report."""
    from stagecraft.serve import guard

    hosts = guard.LOOPBACK
    if host not in listening.OWN:
        print(
            f"stagecraft: --host={host}: whoever reaches this machine and has the "
            "address can label; nothing is encrypted",
            file=sys.stderr,
        )
        hosts = (*hosts, host)
    bound, token = listening.bind(host, port), guard.new_token()
    port = bound.getsockname()[1]
    page = app(given, token=token, hosts=hosts, port=port)
    print(f"{listening.address(host, port)}/#{token}", flush=True)
    listening.run(page, bound)
    agreement_report.show(given, label_records.write(given))
