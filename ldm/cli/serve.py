"""`ldm serve`: the page and the HTTP API (extra `web`)."""

import argparse
import ipaddress
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ldm.cli import options


def add(commands: Any) -> None:
    text = "a page in the browser, and an HTTP API"
    about = "A page on the loopback address, and an HTTP API: /v1 (its own), /sdapi/v1 (as AUTOMATIC1111's). Stop with Ctrl-C."
    command = commands.add_parser("serve", help=text, allow_abbrev=False, description=about)
    command.add_argument("--host", default="127.0.0.1", help="where to listen; beyond loopback a token is wanted")
    command.add_argument("--port", type=int, default=7860, help="(default 7860; 0 for any that is free)")
    command.add_argument("--token", help="what clients must show (beyond loopback, drawn where left out)")
    command.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a name that clients may call it by")
    command.add_argument("--queue", type=int, default=16, metavar="N", help="jobs that may wait (default 16)")
    command.add_argument("--most-pixels", type=int, metavar="N", help="of a picture that is made (default 1024 x 1024)")
    command.add_argument("--adapter-folder", type=Path, metavar="FOLDER", help="LoRAs that requests may name")
    command.add_argument("--no-page", dest="page", action="store_false", help="the HTTP API alone, which needs no gradio")
    options.add_model(command, fast=True)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn", *(("gradio",) if args.page else ()))):
        raise ImportError("ldm serve needs the extra web; install it with: pip install 'ldm[web]'")
    for name, value, lowest, highest in (("port", args.port, 0, 65535), ("queue", args.queue, 1, 10_000)):
        if not lowest <= value <= highest:
            raise ValueError(f"{name} {value}; expected {lowest} to {highest}")
    if args.most_pixels is not None and args.most_pixels < 64 * 64:
        raise ValueError(f"most-pixels {args.most_pixels}; expected {64 * 64} or more")
    if args.adapter_folder is not None and not args.adapter_folder.is_dir():
        raise ValueError(f"adapter-folder {args.adapter_folder}: there is no such folder")
    from ldm.web import server
    from ldm.web.form import Limits

    limits = Limits(adapter_folder=args.adapter_folder, **({"most_pixels": args.most_pixels} if args.most_pixels else {}))
    asked = server.Options(
        host=args.host,
        port=args.port,
        names=tuple(args.allow_host),
        token=args.token,
        bound=args.queue,
        page=args.page,
        limits=limits,
    )
    asked = server.with_token(asked)
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        listener = socket.create_server((args.host, args.port), family=family)
    except OSError as error:
        raise ValueError(
            f"{args.host}:{args.port}: cannot listen there ({error.strerror}); try another --host or --port"
        ) from None
    with listener:
        components = options.load(args)
        host, port = _reachable(args.host, listener), listener.getsockname()[1]
        query = f"?token={asked.token}" if asked.token else ""
        page = f"http://{host}:{port}/{query}, " if args.page else ""
        print(f"{components.name}: {page}http://{host}:{port}/v1, described at /openapi.json", flush=True)
        if asked.token:
            print(f"token: {asked.token}", flush=True)
        server.server(components, asked).run(sockets=[listener])


def _reachable(host: str, listener: socket.socket) -> str:
    """The host as an address in a browser names it: of a server that listens on every address, the one that leads outward."""
    if ipaddress.ip_address(listener.getsockname()[0]).is_unspecified:
        host = _outward(listener.family)
    return f"[{host}]" if ":" in host else host


def _outward(family: int) -> str:
    """This machine's address towards others, or the loopback one where it has no network. Connecting UDP sends nothing."""
    far, near = ("2001:db8::1", "::1") if family == socket.AF_INET6 else ("192.0.2.1", "127.0.0.1")  # RFC 3849, RFC 5737
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((far, 9))
        except OSError:
            return near
        return probe.getsockname()[0]
