"""The examples of the documents run as they stand."""

import re
from pathlib import Path

from llama import Guard
from llama.server import (
    chat_completions,
    completions,
    embeddings,
    messages,
    moderations,
    responses,
    utilities,
)
from tests.support import ROOT
from tests.support.script import scripted


def examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def test_the_page_about_tools(capsys):
    llama = scripted(
        'Wait. {"name": "get_weather", "parameters": {"city": "Ulm"}}', "It rains in Ulm, as always."
    )
    llama.tool_format = "json"
    names = {"llama": llama, "guard": Guard(scripted("unsafe\nS2"), version="3-1b")}
    found = examples(ROOT / "docs" / "tools.md")
    assert len(found) >= 9
    for example in found:
        exec(example, names)
    printed = capsys.readouterr().out
    assert "It rains in Ulm, as always." in printed
    assert "get_weather" in printed
    assert "Non-Violent Crimes" in printed


def test_the_page_about_the_server_names_every_endpoint():
    page = (ROOT / "docs" / "server.md").read_text("utf-8")
    modules = (chat_completions, completions, embeddings, messages, moderations, responses, utilities)
    paths = {route.path for module in modules for route in module.router.routes}
    assert len(paths) > 12
    assert not [path for path in paths if path.replace(":path", "") not in page]
