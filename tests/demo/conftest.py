"""Galleries of a micro model, and servers that run while a test does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from small_models import micro_model
from small_tokenizer import write_tokenizer

from dove_fast import DOVE
from dove_fast.demo import DemoServer, Gallery
from dove_fast.text import TextTokenizer


@pytest.fixture(scope="session")
def model() -> DOVE:
    return micro_model()


@pytest.fixture(scope="session")
def reading_model(tmp_path_factory) -> DOVE:
    """One that reads texts."""
    model = micro_model()
    model.tokenizer = TextTokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))
    return model


@pytest.fixture
def serve() -> Iterator[Callable[..., DemoServer]]:
    """Serve a model, or a gallery, until the test is over."""
    running = []

    def start(served: DOVE | Gallery, **options) -> DemoServer:
        gallery = served if isinstance(served, Gallery) else Gallery(served)
        server = DemoServer(gallery, **options)
        thread = threading.Thread(target=server.serve)
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.close()
        thread.join()
