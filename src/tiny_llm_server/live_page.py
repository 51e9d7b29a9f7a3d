"""The live page: static files that come with the package, and may talk to this server alone."""

from pathlib import Path

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "page"
HEADERS = {
    "Cache-Control": "no-cache",  # asked for again each time; unchanged files are not sent again
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """The page at `/`, and what belongs to it under `/page/`."""
    routes = APIRouter()

    @routes.get("/", response_class=FileResponse, include_in_schema=False)
    async def page() -> FileResponse:
        """The page."""
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    @routes.get("/favicon.ico", response_class=FileResponse, include_in_schema=False)
    async def icon() -> FileResponse:
        """The icon, for browsers that ask for it under this name on every page of the server."""
        return FileResponse(FOLDER / "favicon.svg", headers=HEADERS)

    app.include_router(routes)
    app.mount("/page", _Files(directory=FOLDER))


class _Files(StaticFiles):
    """Files with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A file."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
