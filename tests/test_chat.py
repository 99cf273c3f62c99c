"""The terminal's commands: in this process, by pipes, and typed into a real terminal."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama import Llama
from llama.cli.chat import Chat
from llama.cli.conversation import Conversation, Turn
from llama.cli.options import SamplingOptions
from llama.tokenizer import Tokenizer
from llama.tokenizer.chat_format import chat_format
from tests.support.tiny import byte_tokenizer, save_model, small_model

pexpect = pytest.importorskip("pexpect")

PYTHON = [sys.executable, "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]


def talkative_model(tokenizer, **changes):
    """A model whose answers are small letters without an end, when greedy."""
    model = small_model(std=0.5, vocab_size=tokenizer.n_words, **changes)
    letters = model.output.weight[ord("a") : ord("z") + 1].clone()
    model.output.weight.data.zero_()
    model.output.weight[ord("a") : ord("z") + 1] = letters
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, talkative_model(byte_tokenizer(folder)))
    return folder


@pytest.fixture
def llama(folder):
    tokenizer = Tokenizer(folder / "tokenizer.model")
    return Llama(talkative_model(tokenizer, max_batch_size=1, max_seq_len=256), tokenizer)


@pytest.fixture
def chat(llama):
    return Chat(llama, Conversation(), SamplingOptions(temperature=0, max_gen_len=8))


def said(capsys) -> str:
    return capsys.readouterr().out


# Ids of a conversation


def test_a_turn_is_encoded_as_within_a_dialog(llama, llama3_tokenizer):
    for tokenizer in (llama.tokenizer, llama3_tokenizer):
        formatter = chat_format(tokenizer)
        first = [{"role": "system", "content": "s"}, {"role": "user", "content": "one"}]
        answer = tokenizer.encode("two", bos=False, eos=False)
        ids = [*formatter.encode_dialog_prompt(first), *answer, *formatter.encode_next_turn("three")]
        whole = [*first, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
        assert ids == formatter.encode_dialog_prompt(whole)


def test_the_history_is_the_ids_that_were_generated(llama):
    odd = [ord("a"), 300 % llama.tokenizer.n_words, 0xF0]  # whose text would be encoded otherwise
    conversation = Conversation("be brief", [Turn("hello", odd)])
    ids = conversation.prompt(llama, "again")
    opening = llama.formatter.encode_dialog_prompt(
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    )
    assert ids == [*opening, *odd, *llama.formatter.encode_next_turn("again")]


def test_a_next_turn_reads_its_new_tokens_only(chat, llama, capsys):
    chat.take("hello")
    chat.take("/speed")
    chat.take("and")
    new = 1 + len(llama.formatter.encode_next_turn("and"))  # the last token drawn was never read
    found = re.search(r"(\d+) of (\d+) prompt tokens were in the cache", said(capsys))
    assert int(found[2]) - int(found[1]) == new


# Commands


def test_answers_and_commands(chat, capsys, tmp_path):
    chat.take("hello")
    first = said(capsys)
    assert re.fullmatch(r"[a-z]{8}\n\[cut off at max_gen_len=8\]\n", first)
    chat.take("/retry")
    assert said(capsys) == first
    assert len(chat.conversation.turns) == 1
    chat.take("/system Be kind.")
    assert said(capsys) == "[system: Be kind.]\n"
    chat.take("/retry")
    assert said(capsys) != first
    chat.take(f"/save {tmp_path}/c.json")
    saved = copy.deepcopy(chat.conversation)
    chat.take("/reset")
    chat.take("/system -")
    assert chat.conversation == Conversation()
    chat.take(f"/load {tmp_path}/c.json")
    assert chat.conversation == saved
    capsys.readouterr()
    chat.take("/params temperature=0.5 top_k=4 max_gen_len=none")
    assert "[temperature=0.5 top_p=0.9 top_k=4 min_p=0.0" in (shown := said(capsys))
    assert "max_gen_len=None" in shown
    chat.take("/params stop='a b'")
    assert chat.sampling.stop == ("a b",)
    chat.take("/help")
    assert "/retry" in said(capsys)
    chat.take("")
    assert said(capsys) == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nonsense", "unknown command /nonsense; /help lists"),
        ("/retry", "no message to retry"),
        ("/params temperature=-1", "temperature must be 0"),
        ("/params seed=x", "seed must be a whole number, not 'x'"),
        ("/params heat=1", "expected name=value, not 'heat=1'"),
        ("/save", "no file given"),
        ("/load", "no file given"),
        ("/load setup.py", "not a conversation written by /save"),
        ("x" * 300, "the message and system prompt need 3.. tokens, but the context holds 256"),
    ],
)
def test_mistakes_change_nothing(chat, line, message):
    sampling = chat.sampling
    with pytest.raises((ValueError, OSError), match=message):
        chat.take(line)
    assert (chat.conversation, chat.sampling) == (Conversation(), sampling)


def test_a_saved_conversation_of_another_tokenizer_is_encoded_anew(llama):
    text = json.dumps({"system": "", "turns": [{"user": "a", "assistant": "bc", "ids": [99_999]}]})
    assert Conversation.parse(text, llama).turns == [Turn("a", [ord("b"), ord("c")])]


def test_a_full_context_drops_the_oldest_turns_and_tells_which(chat, capsys):
    """256 tokens, of which a quarter is kept for the answer."""
    chat.take("/params max_gen_len=40")
    for n in range(8):
        chat.take(f"message number {n}")
    out = said(capsys)
    told = re.findall(r"\[The context of 256 tokens is full. Dropped the oldest turn: \"(.*)\"\]", out)
    kept = [turn.message for turn in chat.conversation.turns]
    assert told
    assert told + kept == [f"message number {n}" for n in range(8)]
    assert out.count("[cut off at max_gen_len=40]") == 8
    chat.take("y" * 150)  # leaves no room for any other
    assert f"Dropped the oldest {len(kept)} turns: " + ", ".join(f'"{m}"' for m in kept) in said(capsys)
    chat.take("/params max_gen_len=None")
    chat.take("/retry")
    assert "[cut off: the context of 256 tokens is full]" in said(capsys)


# Pipes


def run(command: list[str], typed: str = "", **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=120, **options)


def test_complete_prints_plain_text_and_takes_a_pipe(folder, command_line):
    options = [folder, "--max_gen_len", 9, "--temperature", 0]
    code, out, error = command_line("complete", *options, "--prompt", "12")
    assert code == 0, error
    assert re.fullmatch("[a-z]{9}\n", out)
    assert command_line("complete", *options, typed="12\n")[1] == out


def test_a_chat_by_a_pipe(folder, command_line):
    options = ["--max_gen_len", 5, "--temperature", 0, "--max_seq_len", 64]
    code, out, _ = command_line("chat", folder, *options, typed="12\n//x\n/quit\nnever")
    assert code == 0
    assert re.fullmatch(r"([a-z]{5}\n\[cut off at max_gen_len=5\]\n){2}", out)


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_quantized_as_told(folder, command, command_line):
    code, _, error = command_line(command, folder, "--quantize", "int3", typed="12\n")
    assert (code, error) == (1, "error: quantize must be int8, int5, int4 or fp8, not 'int3'")
    if "fbgemm" in torch.backends.quantized.supported_engines:
        options = ["--quantize", "int4", "--max_gen_len", 9, "--temperature", 0]
        code, _, error = command_line(command, folder, *options, typed="12\n")
        assert code == 0, error
        assert "in int4 on cpu" in error


@pytest.mark.slow
def test_complete_ends_quietly_when_nobody_reads(folder):
    command = (
        f"{sys.executable} -m llama complete {folder} hello --temperature 0 --max_seq_len 4000 | head -c 5"
    )
    result = run(["sh", "-c", command])
    assert re.fullmatch("[a-z]{5}", result.stdout)
    assert "Error" not in result.stderr
    assert "error" not in result.stderr


# A real terminal


def spawn(command: list[str], state: Path):
    env = {**os.environ, "TERM": "dumb", "XDG_STATE_HOME": str(state)}
    child = pexpect.spawn(command[0], command[1:], encoding="utf-8", timeout=60, env=env)
    child.setwinsize(40, 400)
    return child


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [PYTHON, TORCHRUN], ids=["one", "torchrun"])
def test_typed_into_a_terminal(folder, launcher, tmp_path):
    options = ["--temperature", "0", "--device", "cpu", "--dtype", "float32", "--max_seq_len", "6000"]
    child = spawn([*launcher, "llama", "chat", str(folder), *options], tmp_path)
    child.expect_exact("Ctrl-D quits.")
    child.expect_exact("> ")

    child.sendline("hello")  # an answer that would take the whole context
    child.expect("[a-z]{30}")
    child.send("\x03")
    child.expect_exact("[stopped]")
    child.expect_exact("> ")

    child.send("half a line\x03")  # at the prompt, it clears the line
    child.sendline("/params max_gen_len=5")
    child.expect_exact("max_gen_len=5 seed=None]")
    child.expect_exact("> ")
    child.sendline("one \\")
    child.expect_exact("… ")
    child.sendline("two")
    child.expect(r"[a-z]{5}\r\n\[cut off at max_gen_len=5\]")
    child.expect_exact("> ")

    child.sendline("/params max_gen_len=400")
    child.expect_exact("> ")
    child.sendline("three")
    child.expect("[a-z]{10}")
    child.sendline("/speed")  # typed while the answer runs
    child.expect(r"\[cut off at max_gen_len=400\]\r\n> /speed\r\n\[speed is shown\]")
    child.sendline(f"/save {tmp_path}/c.json")
    child.expect_exact("[saved 3 turns")
    child.sendline("/nonsense")
    child.expect_exact("[unknown command /nonsense; /help lists the commands]")
    child.sendline(f"/load {tmp_path}/missing.json")
    child.expect_exact("No such file")
    child.sendline("/params max_gen_len=4")
    child.sendline("four\nlines of it\n\nare one message")  # delivered at once, so pasted
    child.expect(r"\[4 tokens at .* were in the cache")
    child.expect_exact("> ")
    child.sendline("//five")
    child.expect(r"\[4 tokens at .* were in the cache")
    child.expect_exact("> ")
    child.send("/sa\t")
    child.expect_exact("/save")
    child.sendline(f" {tmp_path}/c.j\t")
    child.expect_exact("[saved 5 turns")
    child.expect_exact("> ")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    saved = json.loads((tmp_path / "c.json").read_text())
    assert [turn["user"] for turn in saved["turns"]] == [
        *("hello", "one \ntwo", "three"),
        *("four\nlines of it\n\nare one message", "/five"),
    ]
    history = (tmp_path / "llama" / "history").read_text().splitlines()
    assert history[0] == "hello"
    assert history[-1] == "/quit"


@pytest.mark.slow
def test_the_terminal_is_as_it_was_when_the_program_is_ended(folder):
    child = spawn(["sh", "-i"], folder)
    command = f"{sys.executable} -m llama chat {folder} --temperature 0 --max_seq_len 6000"
    child.sendline(f"stty -a > {folder}/before; sh -c 'echo $$ > {folder}/pid; exec {command}'")
    child.expect_exact("Ctrl-D quits.")
    child.sendline("hello")
    child.expect("[a-z]{30}")
    os.kill(int((folder / "pid").read_text()), signal.SIGTERM)
    child.sendline(f"stty -a > {folder}/after; echo done $((1 + 1))")
    child.expect_exact("done 2")
    child.close()
    assert (folder / "after").read_text() == (folder / "before").read_text()
