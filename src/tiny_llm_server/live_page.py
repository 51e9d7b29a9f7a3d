"""The live page: static files of the package. Browsers let the page connect only to this server."""

from pathlib import Path

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "page"
HEADERS = {
    "Cache-Control": "no-cache",  # browsers revalidate each time; unchanged files are not sent again
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """Add the page at `/`, and its files under `/page/`."""
    routes = APIRouter()

    @routes.get("/", response_class=FileResponse, include_in_schema=False)
    async def page() -> FileResponse:
        """Return the page."""
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    @routes.get("/favicon.ico", response_class=FileResponse, include_in_schema=False)
    async def icon() -> FileResponse:
        """Return the icon, which browsers request here for pages without a link to one."""
        return FileResponse(FOLDER / "favicon.svg", headers=HEADERS)

    app.include_router(routes)
    app.mount("/page", _Files(directory=FOLDER))


class _Files(StaticFiles):
    """Serves files with the headers of the page."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return a file."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
