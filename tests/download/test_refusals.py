"""What download.sh cannot do: each is one sentence, and nothing that has arrived is lost."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.download.script import MODEL, SHARD, Script, refusal
from tests.support.download_server import SIGNATURE, FakeLlamaServer


def test_a_403_stops_at_once(both: Script, server: FakeLlamaServer) -> None:
    both.env["PRESIGNED_URL"] = server.link().replace(SIGNATURE, "forged")
    sentence = refusal(both(MODEL), 1)
    assert "(403): it has expired, is used up, or is not for this family" in sentence
    assert "Request one for Llama 3.2 at https://" in sentence
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("link", "cause"),
    [
        ({"expires": int(time.time()) - 5 * 3600 - 60}, "it expired 5 hours ago"),
        ({"host": "llama3-1.llamameta.net"}, "a link for Llama 3.1, but this model is Llama 3.2"),
        ({"host": "llama3-2-lightweight.llamameta.net"}, "it has expired, is used up"),
        ({"host": "download6.llamameta.net"}, "a link for Llama 3, but this model is Llama 3.2"),
        ({"host": "download.llamameta.net"}, "a link for Llama 2, but this model is Llama 3.2"),
        ({"host": "???>>>~~~.llama3-3.llamameta.net"}, "a link for Llama 3.3, but"),
    ],
)
def test_a_refused_link_tells_what_its_terms_say(
    script: Script, server: FakeLlamaServer, link: dict[str, str], cause: str
) -> None:
    script.env["PRESIGNED_URL"] = server.link(**link).replace("~", "%7E")
    server.always[f"{MODEL}/checklist.chk"] = 403
    assert cause in refusal(script(MODEL), 1)


def test_a_link_that_expires_on_the_way_keeps_what_is_here(
    both: Script, server: FakeLlamaServer, weights: bytes
) -> None:
    server.faults[f"{MODEL}/{SHARD}"] = [("cut", 5000), 403]
    assert "(403)" in refusal(both(MODEL), 1)
    assert both.got(f"{SHARD}.part") == weights[:5000]


def test_a_web_page_is_not_saved_as_weights(both: Script, server: FakeLlamaServer, weights: bytes) -> None:
    server.always[f"{MODEL}/checklist.chk"] = "page"
    assert "leads to a web page" in refusal(both(MODEL), 1)
    assert list((both.cwd / MODEL).iterdir()) == []


def test_a_web_page_does_not_spoil_what_is_here(
    both: Script, server: FakeLlamaServer, weights: bytes
) -> None:
    part = both.part(weights[:5000])
    server.faults[f"{MODEL}/{SHARD}"] = ["page"]
    assert "leads to a web page" in refusal(both(MODEL), 1)
    assert part.read_bytes() == weights[:5000]


def test_a_web_page_without_its_type_is_recognised(script: Script, server: FakeLlamaServer) -> None:
    server.files[f"{MODEL}/{SHARD}"] = b"\n <!doctype html><title>Log in</title>"
    assert "leads to a web page" in refusal(script(MODEL), 1)


@pytest.mark.parametrize(
    ("link", "sentence"),
    [
        ("{}/?Policy=p&Signature=" + SIGNATURE, "no *"),
        ("https://l.facebook.com/l.php?u=https%3A%2F%2Fx%2F*%3FSignature=" + SIGNATURE, "around"),
        ("https://nam.safelinks.example/?url=https%3a%2f%2fx%2f*&k=" + SIGNATURE, "around"),
        ("download.llamameta.net/*?Signature=" + SIGNATURE, "must begin with https://"),
        ("", "There is no link"),
    ],
)
def test_links_that_cannot_work(script: Script, server: FakeLlamaServer, link: str, sentence: str) -> None:
    script.env["PRESIGNED_URL"] = link.format(server.origin)
    assert sentence in refusal(script(MODEL), 2)
    assert server.requests == []


def test_a_link_as_an_argument_is_refused_unrepeated(script: Script, server: FakeLlamaServer) -> None:
    assert "standard input" in refusal(script(server.link()), 2)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["Llama-9-1B"], 'no model "Llama-9-1B"; ./download.sh --list'),
        (["7B"], '"7B" could be LLaMA-7B or llama-2-7b;'),
        (["70B"], '"70B" could be llama-2-70b or Meta-Llama-3-70B;'),
        ([], "Name the models"),
        (["--model"], "Unknown option --model"),
        (["--target"], "--target needs a folder"),
    ],
)
def test_wrong_usage(script: Script, server: FakeLlamaServer, args: list[str], sentence: str) -> None:
    assert sentence in refusal(script(MODEL, *args) if args else script(), 2)
    assert server.requests == []


def test_names_as_people_write_them(script: Script, server: FakeLlamaServer) -> None:
    spellings = {
        "8B": "Meta-Llama-3-8B",
        "8b-Instruct": "Meta-Llama-3-8B-Instruct",
        "70B-instruct": "Meta-Llama-3-70B-Instruct",
        "7B-chat": "llama-2-7b-chat",
        "13B-chat": "llama-2-13b-chat",
        "30B": "LLaMA-30B",
        "3.2-1B": "Llama-3.2-1B",
        "Llama3.1-8B-Instruct": "Meta-Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.1-8B": "Meta-Llama-3.1-8B",
        "meta-llama-3.1-405b-instruct-mp16": "Meta-Llama-3.1-405B-Instruct-MP16",
    }
    script.env["PRESIGNED_URL"] = server.link().replace(SIGNATURE, "forged")
    result = script(",".join(spellings), "8B")
    assert re.findall(r"download.sh: (\S+): the", result.stderr) == list(spellings.values())


def test_a_disk_too_small_is_noticed_before_starting(script: Script, server: FakeLlamaServer) -> None:
    script.stub("df", 'echo "/dev/disk 9 9 2413000 99% /"')
    sentence = refusal(script(MODEL), 1)
    assert re.search(r"has 2\.5 GB free, but 2\.5 GB are still to be downloaded", sentence)
    assert server.requests == []
    script.part(b"x" * 5_000_000)  # what is here already need not come again
    server.always[f"{MODEL}/checklist.chk"] = 403
    assert "(403)" in refusal(script(MODEL), 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up(both: Script) -> None:
    (both.cwd / MODEL).mkdir()
    (both.cwd / MODEL / f"{SHARD}.part").symlink_to("/dev/full")
    assert "is the disk full?" in refusal(both(MODEL), 1)


@pytest.mark.parametrize(
    ("missing", "sentence"), [("curl", "curl or GNU wget is needed"), ("md5sum", "md5sum, md5 or")]
)
def test_missing_tools(script: Script, missing: str, sentence: str) -> None:
    (script.bin / missing).unlink()
    assert sentence in refusal(script(MODEL), 1)


def test_a_broken_tool_costs_no_file(script: Script, weights: bytes) -> None:
    script.stub("md5sum", "exit 1")
    script.part(weights).rename(script.cwd / MODEL / SHARD)
    assert "md5sum does not work" in refusal(script(MODEL), 1)
    assert script.got() == weights


def test_one_failing_model_does_not_lose_the_others(script: Script, server: FakeLlamaServer) -> None:
    server.publish("Llama-3.2-3B")
    result = script("Llama-3.2-1B", MODEL, "Llama-3.2-3B")
    assert result.returncode == 1
    assert "download.sh: Llama-3.2-1B: the server refuses the link (404)" in result.stderr
    assert result.stderr.endswith("Failed: Llama-3.2-1B.\n")
    ready = result.stdout.partition("Ready")[2]
    assert re.findall("--ckpt_dir (.*?)/", ready) == [MODEL, "Llama-3.2-3B"]
