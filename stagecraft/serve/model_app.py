"""A model behind OpenAI's protocol; run by `stagecraft serve`.

    POST /v1/completions        prompts as texts or ids; echo and log-probabilities
    POST /v1/chat/completions   messages, through the model's chat template
    GET  /v1/models             the one model that is served

Reference: platform.openai.com/docs/api-reference.
"""

import asyncio
import contextlib
import json
import time
from pathlib import Path

import jax

from stagecraft import process, runs, sharding
from stagecraft.errors import UserError
from stagecraft.models import locate
from stagecraft.models.language import Language
from stagecraft.report import chat
from stagecraft.run import open_run
from stagecraft.serve import guard, listening, requests
from stagecraft.serve.answering import Answer, Failed
from stagecraft.serve.engine import Busy, Engine
from stagecraft.serve.replies import Reply
from stagecraft.serve.writing import Speller
from stagecraft.signals import endpoint, judge

HUNG_UP = 499  # nobody reads the answer; the number is nginx's
SSE = "text/event-stream"


def serve(
    root: Path | None,
    stage: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    key: str = "",
    rows: int = 16,
    context: int = 0,
) -> None:
    """Serves a model until it is stopped.

    Args:
        root: the work directory; None where `stage` is not one of a run.
        stage: a finished stage that writes text, "" for the one that `chat` takes; or
            "hf:FOLDER", or the folder of a finished stage.
        host: an address of this machine.
        port: 0 for any that is free.
        key: the environment variable with the key that requests must bring, "" for
            none, which is for loopback alone.
        rows, context: see `engine.Engine`.
    """
    listening.check("serve")
    if jax.process_count() > 1:
        raise UserError("serve: runs in one process, and this is one of several")
    secret = endpoint.key_of("--key", key)
    if host not in listening.OWN and not secret:
        raise UserError(
            f"--host={host}: whoever reaches this machine could ask the model; name an "
            "environment variable with a key, --key=NAME"
        )
    bound = listening.bind(host, port)
    port = bound.getsockname()[1]
    with contextlib.closing(bound):
        language, mesh, name, in_turns = open_model(root, stage)
        engine = Engine(language, mesh, rows=rows, context=context)
        # A key protects against other sites' pages as well as a name does.
        hosts = guard.LOOPBACK if host in listening.OWN else ()
        served = app(
            language,
            engine,
            name=name,
            in_turns=in_turns,
            key=secret,
            hosts=hosts,
            port=port,
        )
        print(listening.address(host, port), flush=True)
        try:
            listening.run(served, bound, stop=engine.stop)
        finally:
            engine.close()


def open_model(root: Path | None, stage: str):
    """Reads what is to be served, as `serve` names it.

    Returns:
        `Language`, its mesh, its name, whether it writes in turns of a chat.
    """
    if root is not None:
        run = open_run(root)
        stage = chat.stage_to_ask(run, stage)
        mesh = run.mesh()
        with jax.set_mesh(mesh):
            language = run.language(stage, 1)
        return language, mesh, stage, run.chat_format(stage)
    process.reuse_programs()
    source = locate.locate(stage)
    if source.where == "nowhere":
        raise UserError(
            f"--stage={stage}: expected hf:FOLDER, the folder of a finished stage, as "
            "runs/a/sft, or --workdir with one of its stages"
        )
    if source.info()["module"] != "transformer":
        raise UserError(f"--stage={stage}: is a reward model, which writes no text")
    mesh = sharding.make_mesh(-1, 1, 1)
    with jax.set_mesh(mesh):
        model = source.load(mesh)
        asked = judge.of_source(source, model, runs.whole_rows(1, mesh), "")
    return asked.language, mesh, source.folder.name, asked.chat


def app(
    language: Language,
    engine: Engine,
    *,
    name: str,
    in_turns: bool,
    key: str = "",
    hosts=guard.LOOPBACK,
    port: int,
):
    """Returns the ASGI application.

    Args:
        language: the model.
        engine: that completes its texts.
        name: what requests call it.
        in_turns: whether it was trained on turns of a chat.
        key, hosts, port: see `guard.KeyGuard`.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    speller = Speller(language.tokenizer)
    model = {"id": name, "object": "model", "created": int(time.time())}
    model["owned_by"] = "stagecraft"

    def asking(api):
        async def answer(request):
            asked = requests.read(
                api,
                await request.body(),
                language,
                served=name,
                in_turns=in_turns,
                context=engine.context,
            )
            reply = Reply(asked, name, speller)
            answer = Answer(asked, language, engine)
            watch = asyncio.create_task(_watch(request, answer))
            if asked.stream:
                chunks = _stream(asked, answer, reply, watch)
                return StreamingResponse(chunks, media_type=SSE)
            try:
                pieces = [piece async for piece in answer.pieces()]
            except Failed as error:
                if watch.done():
                    return Response(status_code=HUNG_UP)
                return JSONResponse(_failure(error), 500)
            finally:
                watch.cancel()
            return JSONResponse(reply.whole(pieces, answer.usage()))

        return answer

    async def models(request):
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request):
        if request.path_params["name"] != name:
            line = f"this server has one model, {name!r}"
            return JSONResponse(guard.error(line, code="model_not_found"), 404)
        return JSONResponse(model)

    async def refused(request, error):
        body = guard.error(str(error), param=error.param, code=error.code)
        return JSONResponse(body, error.status)

    async def busy(request, error):
        return JSONResponse(guard.error(str(error)), 503, {"Retry-After": "1"})

    async def other(request, error):
        return JSONResponse(guard.error(error.detail), error.status_code)

    calls = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}
    routes = [Route(path, asking(api), methods=["POST"]) for path, api in calls.items()]
    routes += [Route("/v1/models", models), Route("/v1/models/{name:path}", one_model)]
    handlers = {requests.Refused: refused, Busy: busy, HTTPException: other}
    settings = dict(token=key, hosts=hosts, port=port)
    return Starlette(
        routes=routes,
        middleware=[Middleware(guard.KeyGuard, **settings)],
        exception_handlers=handlers,
    )


async def _watch(request, answer):
    """Gives an answer up once its client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.give_up()


async def _stream(asked, answer, reply, watch):
    """Yields an answer as server-sent events."""
    begun = set()
    try:
        async for piece in answer.pieces():
            if piece.index not in begun:
                begun.add(piece.index)
                if opening := reply.opening(piece.index):
                    yield _event(opening)
            if piece.text or piece.shown or piece.finish:
                yield _event(reply.chunk(piece))
        if asked.usage:
            yield _event(reply.counts(answer.usage()))
        yield "data: [DONE]\n\n"
    except Failed as error:
        yield _event(_failure(error))
    finally:
        watch.cancel()


def _event(value):
    return f"data: {json.dumps(value)}\n\n"


def _failure(error):
    body = guard.error(str(error))
    body["error"]["type"] = "server_error"
    return body
