"""The page as an ASGI application that takes nothing but what the page sends."""
from typing import Any, Awaitable, Callable, MutableMapping

import gradio as gr
from fastapi import FastAPI
from fastapi.middleware import Middleware
from fastapi.responses import PlainTextResponse
from gradio.blocks import Block
from gradio.state_holder import SessionState

from .analysis import MAX_BYTES
from .page import CSS, THEME

__all__ = ['create_app']

OPEN = {'app_id', 'call', 'cancel', 'heartbeat', 'info', 'queue', 'reset', 'startup-events'}  # of Gradio's own routes
LARGEST_BODY = MAX_BYTES * 4 // 3 + 100_000  # base64, and what is around it
LARGEST_TOGETHER = 16 * LARGEST_BODY  # of requests at the same time
# whatever a release of Gradio asks for, the browser asks nobody but this machine; Gradio's templates need eval
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
Message = MutableMapping[str, Any]


class OnlyThePage:
    """Closes Gradio's ways to put files on the disk or to fetch addresses, and refuses large bodies unread.

    Its answers forbid the browser to ask other machines.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.arriving = 0  # bytes of the bodies that are read

    async def __call__(
            self,
            scope: Message,
            receive: Callable[[], Awaitable[Message]],
            send: Callable[[Message], Awaitable[None]],
    ) -> None:
        async def send_with_policy(message: Message) -> None:
            if message['type'] == 'http.response.start':
                message['headers'] = [*message.get('headers', ()), (b'content-security-policy', POLICY)]
            await send(message)

        if scope['type'] == 'http':
            parts = scope['path'].strip('/').split('/')
            headers = dict(scope['headers'])
            length = b'' if b'transfer-encoding' in headers else headers.get(b'content-length', b'')
            refused, size = '', int(length) if length.isdigit() else 0
            if parts[0] == 'gradio_api' and (len(parts) < 2 or parts[1] not in OPEN):
                refused, status = 'This page has no such address.', 404
            elif scope['method'] == 'POST' and not length.isdigit():
                refused, status = 'Say how long the request is (Content-Length).', 411
            elif size > LARGEST_BODY:
                refused, status = f'The limit is {MAX_BYTES / 1e6:.0f} MB.', 413
            elif self.arriving + size > LARGEST_TOGETHER:
                refused, status = 'Too many pictures are being sent: try again in a minute.', 503
            if refused:
                await PlainTextResponse(refused, status)(scope, receive, send)
                return
            self.arriving += size
            try:
                await self.app(scope, receive, send_with_policy)
            finally:
                self.arriving -= size
        else:
            await self.app(scope, receive, send_with_policy)


def _no_file(block: Any, path: Any) -> Any:
    raise gr.Error('This page takes no files by name or address.', print_exception=False)


def _keep_no_value(session: Any, key: int, value: Any) -> None:
    """Gradio would keep what every part shows, pictures too, for as long as it knows the session."""


def create_app(page: gr.Blocks) -> FastAPI:
    """The application that serves a page.

    Args:
        page: As build makes it.
    """
    app = FastAPI(middleware=[Middleware(OnlyThePage)], docs_url=None, redoc_url=None, openapi_url=None)
    page.queue(max_size=64)  # of bodies up to LARGEST_BODY
    for of, name, instead in (
            # values that name a file: Gradio would copy or fetch it, also on a new block
            (Block, 'move_resource_to_block_cache', _no_file), (Block, 'async_move_resource_to_block_cache', _no_file),
            (SessionState, '_update_value_in_config', _keep_no_value)):
        if not hasattr(of, name):  # must not start unguarded
            raise ImportError(f'Gradio {gr.__version__} is not known here: pip install gradio==6.31.0')
        setattr(of, name, instead)
    return gr.mount_gradio_app(app, page, path='/', theme=THEME, css=CSS, footer_links=[], show_error=False)
