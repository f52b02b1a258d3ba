"""dove-fast demo: a page on this machine that shows what the tokens of a picture hold."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import TYPE_CHECKING

from dove_fast.commands.options import EXIT_DONE, add_command, add_model_options, load

if TYPE_CHECKING:
    from dove_fast.commands.options import Commands

__all__ = ["add"]

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 7860

DEMO_EXAMPLES = """examples:
  dove-fast demo                          then open http://127.0.0.1:7860
  dove-fast demo --port 0                 on any free port, which it prints
  dove-fast demo --checkpoint model/ --device cuda
Ctrl-C ends it. The last few pictures stay in memory; nothing is written, and nothing is loaded from elsewhere."""


def add(commands: Commands) -> None:
    """Add the command."""
    summary = "serve a page where a slider moves the number of a picture's tokens"
    parser = add_command(commands, "demo", summary, DEMO_EXAMPLES)
    add_model_options(parser)
    parser.add_argument(
        "--eos-threshold",
        type=float,
        metavar="P",
        help="the probability above which a picture ends, until the page's slider is moved (default: the checkpoint's)",
    )
    parser.add_argument(
        "--host",
        default=DEFAULT_HOST,
        metavar="ADDRESS",
        help="the address to serve on; others than this machine's own let other machines in, and there is no password "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        metavar="N",
        help="the port to serve on, 0 for any that is free (default: %(default)s)",
    )
    parser.set_defaults(run=run, resume="the page is no longer served")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from dove_fast.demo import DemoServer, Gallery

    gallery = Gallery(load(arguments).model, batch_size=arguments.batch_size, eos_threshold=arguments.eos_threshold)
    model = arguments.checkpoint or "tiny"
    # The page, which others may see, does not say where the directory lies.
    name = os.path.basename(os.path.abspath(model))
    server = DemoServer(gallery, name=name, host=arguments.host, port=arguments.port)
    try:
        if not server.is_local:
            print(
                f"dove-fast: other machines that reach {arguments.host}, port {server.port}, can use this "
                "page; there is no password, and pictures travel unencrypted",
                file=sys.stderr,
            )
        print(f"{server.url} shows {model} on {gallery.model.device}; Ctrl-C ends it", flush=True)
        with warnings.catch_warnings():
            # Pillow's, of pictures that people give: what cannot be read, the page says.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            server.serve()
    finally:
        server.close()
    return EXIT_DONE
