"""`editrl serve-reward`: any reward behind HTTP, for `remote` rewards of training and scoring runs elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import ipaddress
import json
import logging
import os
import signal
import socket
from pathlib import Path
from typing import Any

from editrl.cli.parser import CommandParser, number
from editrl.errors import EditrlError


def main(argv: list[str]) -> None:
    """Serve a reward over HTTP, for the reward `remote`."""
    parser = CommandParser("editrl serve-reward", main.__doc__)
    parser.add_argument("reward", help="name (`editrl rewards`), path/to/file.py:Name or package.module:Name")
    parser.add_argument("--kwargs", nargs="+", default=[], help="its arguments: key=value ..., or a YAML mapping")
    parser.add_argument("--columns", nargs="+", default=[], help="columns to ask for that its signature does not name")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--batch_size", "--batch-size", type=number(int, least=1), help="samples at a time; default all"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=number(int, least=0), default=8000, help="port (8000); 0: any free one")
    parser.add_argument("--token_env", "--token-env", help="environment variable with the token that clients must send")
    parser.add_argument("--token_file", "--token-file", type=Path, help="file with the token that clients must send")
    parser.add_argument("--open", action="store_true", help="allow another --host without a token")
    parser.add_argument(
        *("--max_body_mb", "--max-body-mb"), type=number(float, above=0), default=512, help="of a request, in MB (512)"
    )
    parser.add_argument("--queue", type=number(int, least=1), default=64, help="requests that may wait (64)")
    parser.add_argument(
        "--timeout", type=number(float, above=0), default=300, help="seconds of scoring, then it counts as hung (300)"
    )
    parser.add_argument(
        "--grace", type=number(int, least=1), default=30, help="seconds to end requests in progress after SIGTERM (30)"
    )
    serve(parser.parse_args(argv))


def serve(options: argparse.Namespace) -> None:
    """Load the reward, then open the port; returns after SIGTERM, when the requests in progress are answered."""
    token = read_token(options)
    if token is None and not options.open and not is_loopback(options.host):
        raise EditrlError(
            f"--host {options.host} lets other machines in: give a token (--token_env or --token_file), or --open to "
            "serve whoever comes"
        )
    try:
        import uvicorn

        from editrl.serving.app import create_app
    except ImportError as error:
        raise EditrlError(f"serving needs fastapi and uvicorn ({error}); pip install 'editrl[serve]'") from error
    from editrl.cli.edit import find_device
    from editrl.registry import load_reward, reward_name
    from editrl.serving.service import RewardService

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    device = find_device(options.device)
    door = listen(options.host, options.port)  # before the weights: a port in use is better found now
    with contextlib.closing(door):
        kwargs = read_kwargs(options.kwargs)
        reward = load_reward(options.reward, **kwargs)
        service = RewardService(
            reward,
            reward_name(options.reward),
            identity=identity(options.reward, kwargs),
            device=device,
            columns=options.columns,
            batch_size=options.batch_size,
        )
        limits = {"max_body": int(options.max_body_mb * 1e6), "queue": options.queue, "timeout": options.timeout}
        app = create_app(service, token=token, **limits)
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            log_level="warning",
            timeout_keep_alive=75,  # longer than clients keep idle connections
            timeout_graceful_shutdown=options.grace,
        )
        door.listen(128)
        host, port = door.getsockname()[:2]
        print(f"serving {service.name} on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        # uvicorn stops gracefully, then raises the signal again for whoever handled it before.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            uvicorn.Server(config).run(sockets=[door])
        finally:
            signal.signal(signal.SIGTERM, before)


def identity(spec: str, kwargs: dict[str, Any]) -> str:
    """Hash of which reward it is: its name or file, its arguments, the version. The same wherever the file lies."""
    from editrl import __version__
    from editrl.registry import split_alias

    spec = split_alias(spec)[1]
    file, _, name = spec.rpartition(":")
    if file.endswith(".py"):
        spec = f"{hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()}:{name}"
    text = json.dumps([__version__, spec, kwargs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_token(options: argparse.Namespace) -> str | None:
    """The token, or None where neither option is given. EditrlError for one that is missing or empty."""
    from editrl.serving.messages import check_token

    if options.token_env is not None and options.token_file is not None:
        raise EditrlError("--token_env and --token_file both say where the token is; give one")
    if options.token_env is not None:
        token, where = os.environ.get(options.token_env, ""), f"--token_env: the variable {options.token_env}"
    elif options.token_file is not None:
        try:
            token, where = options.token_file.read_text(encoding="utf-8"), f"--token_file {options.token_file}"
        except (OSError, UnicodeDecodeError) as error:
            raise EditrlError(f"--token_file {options.token_file}: cannot be read ({error})") from error
    else:
        return None
    return check_token(token, where)


def read_kwargs(words: list[str]) -> dict[str, Any]:
    """`model=folder num_frames=4`, or one YAML (or JSON) mapping, as constructor arguments."""
    from editrl.cli.yaml_file import parse_yaml

    if len(words) == 1 and "=" not in words[0].partition(":")[0]:
        return parse_yaml(words[0], "--kwargs", mapping=True)
    kwargs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise EditrlError(f"--kwargs: '{word}' is no key=value; or give one YAML mapping in quotes")
        kwargs[key] = parse_yaml(value, f"--kwargs {key}")
    return kwargs


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening: until then clients are refused, and do not hang."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        door = socket.socket(family, kind, protocol)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
    except (OSError, OverflowError) as error:
        raise EditrlError(f"--host {host} --port {port}: cannot listen there ({error}); give another") from error
    return door
