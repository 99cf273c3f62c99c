"""Images in prompts and dialogs, through the engine."""

import base64

import pytest
import torch

from llama import Llama
from llama.cli.chat import Chat
from llama.cli.conversation import Conversation
from llama.cli.options import SamplingOptions
from llama.errors import ArgumentError, PromptError
from llama.prompts import encode_texts
from llama.tokenizer import Tokenizer
from llama.vision import PlacedImage, TiledImage, VisionTransformer
from tests.support.tiny import small_model, write_tokenizer
from tests.support.vision import IMAGE, picture, random_vision

WIDE, TALL, SMALL = picture(112, 50), picture(40, 150, seed=1), picture(40, 40, seed=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_tokenizer(path)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return random_vision(max_seq_len=160)


@pytest.fixture
def llama(model, tokenizer) -> Llama:
    model.forget_images()
    return Llama(model, tokenizer)


def image(source) -> dict:
    return {"type": "image", "image": source}


def ask(*content) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


DIALOGS = [
    [{"role": "user", "content": "the llama"}],
    ask(image(WIDE), "the llama in the"),
    ask("an", image(TALL), image(SMALL), "in", image(WIDE), "er"),
    [{"role": "system", "content": "the"}, *ask("in the", image(SMALL))],
]
FORMAT = {"max_gen_len": 8, "logprobs": True}


def encoded(llama: Llama, dialogs) -> tuple[list[list[int]], list[list[TiledImage]]]:
    requests = llama.chat_requests(dialogs)
    return [request.prompt for request in requests], [list(request.images) for request in requests]


def answers(llama: Llama, dialogs, **options):
    found = llama.chat_completion(dialogs, **{"temperature": 0, **FORMAT, **options})
    return [(answer["generation"]["content"], answer["logprobs"]) for answer in found]


def test_ids_are_metas(llama):
    """User header, image where it stands, text; nothing between them."""
    special, encode = llama.tokenizer.special_tokens, llama.tokenizer.encode
    ids, _ = encoded(llama, [ask("an", image(SMALL), "er")])

    def header(role):
        name = encode(role, bos=False, eos=False)
        space = encode("\n\n", bos=False, eos=False)
        return [special["<|start_header_id|>"], *name, special["<|end_header_id|>"], *space]

    middle = [*encode("an", bos=False, eos=False), IMAGE, *encode("er", bos=False, eos=False)]
    expected = [special["<|begin_of_text|>"], *header("user"), *middle, special["<|eot_id|>"]]
    assert ids == [[*expected, *header("assistant")]]


def test_answers_are_those_of_the_model_alone(llama, monkeypatch):
    """Greedy, one request after the other, by `forward` of another model with the same weights."""
    plain = random_vision(max_seq_len=160)
    monkeypatch.setattr(llama.tokenizer, "stop_tokens", [])
    ids, images = encoded(llama, DIALOGS)
    found = llama.generate(ids, temperature=0, max_gen_len=6, logprobs=True, images=images)
    for i, dialog in enumerate(DIALOGS):
        (ids,), (images,) = encoded(llama, [dialog])
        at = [n for n, token in enumerate(ids) if token == IMAGE]
        placed = [PlacedImage(*pair) for pair in zip(at, images, strict=True)]
        logits = plain(torch.tensor([ids]), 0, [placed])[0, -1]
        tokens, logprobs = [], []
        for n in range(6):
            tokens.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(-1).max()))
            logits = plain(torch.tensor([[tokens[-1]]]), len(ids) + n)[0, -1]
        assert found[0][i] == tokens
        assert found[1][i] == pytest.approx(logprobs, abs=1e-4)


def test_alone_is_together(llama):
    together = answers(llama, DIALOGS)
    for dialog, (text, logprobs) in zip(DIALOGS, together, strict=True):
        ((alone, scores),) = answers(llama, [dialog])
        assert alone == text
        assert scores == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "sampling", [pytest.param({"temperature": 0}, marks=pytest.mark.slow), {"temperature": 1.0, "seed": 3}]
)
def test_chunks_and_slots_change_nothing(llama, tokenizer, model, sampling):
    expected = answers(llama, DIALOGS, **sampling)
    other = Llama(random_vision(max_seq_len=160, max_batch_size=2), tokenizer)
    other.engine.prefill_chunk = 5
    found = answers(other, DIALOGS, **sampling)
    assert [text for text, _ in found] == [text for text, _ in expected]
    for (_, a), (_, b) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.slow
def test_batch_invariant_to_the_bit(model, tokenizer):
    model.forget_images()
    llama = Llama(model, tokenizer, batch_invariant=True)
    together = answers(llama, DIALOGS, temperature=1.0, seed=1)
    model.forget_images()
    for dialog, expected in zip(DIALOGS, together, strict=True):
        assert answers(Llama(model, tokenizer, batch_invariant=True), [dialog], temperature=1.0, seed=1) == [
            expected
        ]


@pytest.mark.slow
def test_static_decoding_leaves_images_to_ragged_steps(llama, model, tokenizer):
    expected = answers(llama, DIALOGS)
    found = answers(Llama(model, tokenizer, static=True), DIALOGS)
    for (text, logprobs), (other, scores) in zip(found, expected, strict=True):
        assert text == other
        assert logprobs == pytest.approx(scores, abs=1e-4)


class Count:
    """How often the encoder ran, and how many tokens of each request were in the cache."""

    def __init__(self, llama: Llama) -> None:
        self.llama, self.encoded = llama, 0
        encode = llama.model.vision_model.forward
        self.restore = lambda: setattr(llama.model.vision_model, "forward", encode)

        def counting(image):
            self.encoded += 1
            return encode(image)

        llama.model.vision_model.forward = counting

    def reused(self, dialog) -> int:
        events = self.llama.stream_chat([dialog], max_gen_len=2, temperature=0)
        return next(event.stats for event in events if event.stats).reused_tokens


@pytest.fixture
def count(llama):
    count = Count(llama)
    yield count
    count.restore()


def test_a_next_turn_neither_encodes_nor_reads_an_image_again(llama, count):
    first = ask(image(WIDE), "the llama")
    assert (count.reused(first), count.encoded) == (0, 1)
    prompt = len(encoded(llama, [first])[0][0])
    following = [*first, {"role": "assistant", "content": "in"}, {"role": "user", "content": "er"}]
    assert count.reused(following) >= prompt - 1
    assert count.encoded == 1


def test_another_image_at_the_same_place_is_another_prompt(llama, count):
    count.reused(ask("the", image(WIDE), "llama"))
    before = len(encoded(llama, [ask("the")])[0][0]) - 6
    expected = answers(
        Llama(random_vision(max_seq_len=160), llama.tokenizer), [ask("the", image(TALL), "llama")]
    )
    assert count.reused(ask("the", image(TALL), "llama")) <= before
    assert count.encoded == 2
    found = answers(llama, [ask("the", image(TALL), "llama")])
    assert found[0][0] == expected[0][0]
    assert found[0][1] == pytest.approx(expected[0][1], abs=1e-4)


def test_ranks_of_one_image_in_many_requests_encode_it_once(llama, count):
    answers(llama, [ask(image(WIDE), text) for text in ("the", "llama", "in", "er", "an")])
    assert count.encoded == 1


@pytest.mark.parametrize(
    "part", ["cross_attention_layers.0.attention.wk", "vision_model.vision_encoder.ln_pre"]
)
def test_changed_weights_forget_images(llama, count, part):
    llama.forget()
    count.reused(ask(image(WIDE), "the"))
    weight = llama.model.get_submodule(part).weight
    with torch.inference_mode():
        weight.mul_(1)
    assert count.reused(ask(image(WIDE), "the")) == 0
    assert count.encoded == 2


@pytest.mark.slow
def test_an_image_outlives_the_one_before_it(tokenizer):
    """As when a chat has no room for more images, and drops its first turn."""
    one, other = (Llama(random_vision(max_seq_len=160, max_batch_size=1), tokenizer) for _ in range(2))
    expected = answers(other, [ask(image(WIDE), "the")])
    counted = Count(one)
    counted.reused(ask(image(TALL), image(SMALL), image(WIDE), "the"))
    for sources in ((SMALL, WIDE), (WIDE,)):
        found = answers(one, [ask(*map(image, sources), "the")])
    assert counted.encoded == 3
    assert found[0][0] == expected[0][0]
    assert found[0][1] == pytest.approx(expected[0][1], abs=1e-4)


def test_cancelling_while_an_image_is_read(llama):
    llama.engine.prefill_chunk = 2
    stream = llama.stream_chat([DIALOGS[2]], max_gen_len=4)
    request = llama.stream_chat([DIALOGS[1]], max_gen_len=4, temperature=0)
    next(request)
    stream.close()
    rest = "".join(event.text for event in request)
    assert rest


def test_streams_join_to_the_answer(llama):
    (expected, _) = answers(llama, [DIALOGS[2]])[0]
    events = list(llama.stream_chat([DIALOGS[2]], temperature=0, max_gen_len=8))
    assert "".join(event.text for event in events) == expected


FORMS = {
    "path": lambda path: {"type": "image", "image": str(path)},
    "bytes": lambda path: {"type": "image", "image": path.read_bytes()},
    "transformers' path": lambda path: {"type": "image", "path": str(path)},
    "transformers' url": lambda path: {"type": "image", "url": url(path)},
    "transformers' base64": lambda path: {"type": "image", "base64": url(path).partition(",")[2]},
    "OpenAI": lambda path: {"type": "image_url", "image_url": {"url": url(path)}},
}


def url(path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_every_form(llama, tmp_path, form):
    WIDE.save(path := tmp_path / "wide.png")
    expected = answers(llama, [ask(image(WIDE), "the")])
    found = answers(llama, [ask(FORMS[form](path), {"type": "text", "text": "the"})])
    assert found == [(expected[0][0], pytest.approx(expected[0][1], abs=1e-5))]


def test_parts_of_text_alone_are_that_text(llama):
    parts, text = ask("the ", {"type": "text", "text": "llama"}), [{"role": "user", "content": "the llama"}]
    assert encoded(llama, [parts]) == encoded(llama, [text])


def test_text_that_looks_like_an_image_stays_text(llama):
    ids, _ = encoded(llama, [ask("<|image|>", image(SMALL))])
    assert ids[0].count(IMAGE) == 1
    assert llama.tokenizer.special_tokens["<|image|>"] not in ids[0]
    assert answers(llama, [ask("<|image|>")])
    (ids, mixed), _ = encode_texts(["<|image|>", ["<|image|>", image(SMALL)]], llama.model, llama.tokenizer)
    assert (ids.count(IMAGE), mixed.count(IMAGE)) == (0, 1)
    assert llama.tokenizer.special_tokens["<|image|>"] not in ids + mixed


def test_base_models_continue_text_with_images(llama):
    prompt = [image(SMALL), "the llama"]
    (ids,), _ = encode_texts([prompt], llama.model, llama.tokenizer)
    assert ids[:2] == [llama.tokenizer.bos_id, IMAGE]
    with_image = llama.text_completion([prompt, "the llama"], temperature=0, max_gen_len=6)
    assert with_image[0]["generation"] != with_image[1]["generation"]


def test_echo_and_logprobs_of_a_prompt_with_an_image(llama):
    (found,) = llama.text_completion(
        [["the", image(SMALL), "llama"]], temperature=0, max_gen_len=2, logprobs=True, echo=True
    )
    assert found["generation"].startswith("<|begin_of_text|>thellama")
    at = 2  # behind the begin and "the"
    assert found["tokens"][at] == ""
    assert found["logprobs"][at] == 0
    assert all(logprob < 0 for i, logprob in enumerate(found["logprobs"]) if i not in (0, at))


def test_penalties_leave_the_image_token_alone(llama):
    assert answers(llama, [DIALOGS[1]], repetition_penalty=1.5, presence_penalty=0.5)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([image(SMALL)] * 5, "5 images, but max_images=4"),
        ([image(b"no image")], "cannot be opened"),
        ([image(None)], "each part of a content must be"),
        ([{"type": "audio", "audio": "x"}], "got one with type 'audio' and type, audio"),
        ([7], "not a int"),
        ([{"type": "image_url", "image_url": {"url": "/etc/passwd"}}], "must be a data URL"),
        ([{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}], "must be a data URL"),
        ([image("https://example.com/a.png")], "not downloaded"),
    ],
)
def test_bad_content_is_refused_with_a_sentence(llama, content, sentence):
    with pytest.raises(ArgumentError, match=sentence):
        llama.chat_completion([ask(*content)])


def test_a_text_model_refuses_images(tokenizer):
    llama = Llama(small_model(vocab_size=tokenizer.n_words, max_seq_len=160), tokenizer)
    for call in (
        lambda: llama.chat_completion([ask(image(SMALL))]),
        lambda: llama.text_completion([[image(SMALL)]]),
        lambda: llama.generate([[IMAGE]], images=[[SMALL]]),
    ):
        with pytest.raises(PromptError, match="this model reads text only"):
            call()


def test_ids_and_images_must_agree(llama):
    with pytest.raises(PromptError, match=r"prompt 0: the prompt has 2 image token\(s\) .* but 1 image"):
        llama.generate([[1, IMAGE, IMAGE]], images=[[SMALL]])
    with pytest.raises(PromptError, match=f"{IMAGE} is not a token id"):
        llama.generate([[1, IMAGE]])
    with pytest.raises(ArgumentError, match="images has 1 entries, but there are 2 prompts"):
        llama.generate([[1, IMAGE], [2]], images=[[SMALL]])


def said(capsys) -> str:
    return capsys.readouterr().out


def test_the_terminal_chat_shows_images(llama, capsys, tmp_path):
    WIDE.save(path := tmp_path / "wide.png")
    chat = Chat(llama, Conversation(), SamplingOptions(temperature=0, max_gen_len=4))
    chat.take(f"/image {path}")
    assert said(capsys) == "[wide.png will be sent with your next message]\n"
    chat.take("the llama")
    first = said(capsys)
    assert first.startswith(answers(llama, [ask(image(WIDE), "the llama")], max_gen_len=4)[0][0])
    chat.take("/retry")
    assert said(capsys) == first
    chat.take("in")
    second = said(capsys)
    chat.take(f"/save {tmp_path / 'chat.json'}")
    again = Chat(llama, Conversation(), SamplingOptions(temperature=0, max_gen_len=4))
    again.take(f"/load {tmp_path / 'chat.json'}")
    assert again.conversation.turns == chat.conversation.turns
    said(capsys)
    again.take("/retry")
    assert said(capsys) == second


def test_the_terminal_chat_refuses_bad_images_and_makes_room_for_new_ones(llama, capsys, tmp_path):
    WIDE.save(path := tmp_path / "wide.png")
    (tmp_path / "bad.png").write_text("hello")
    chat = Chat(llama, Conversation(), SamplingOptions(temperature=0, max_gen_len=2))
    with pytest.raises(ArgumentError, match="cannot be opened"):
        chat.take(f"/image {tmp_path / 'bad.png'}")
    with pytest.raises(FileNotFoundError):
        chat.take(f"/image {tmp_path / 'none.png'}")
    with open(tmp_path / "huge.png", "wb") as huge:
        huge.truncate(10**12)  # it takes no space on disk, and would not fit in memory
    with pytest.raises(PromptError, match="has 1,000,000,000,000 bytes"):
        chat.take(f"/image {tmp_path / 'huge.png'}")
    for _ in range(3):
        chat.take(f"/image {path}")
    chat.take("the")
    for _ in range(4):
        chat.take(f"/image {path}")
    with pytest.raises(ArgumentError, match=r"room for 4 image\(s\): start with a larger --max_images"):
        chat.take(f"/image {path}")
    said(capsys)
    chat.take("llama")
    assert said(capsys).startswith('[The room for 4 image(s) is full. Dropped the oldest turn: "the"]')


def test_the_terminal_chat_of_a_text_model_has_no_images(tokenizer):
    llama = Llama(small_model(vocab_size=tokenizer.n_words, max_seq_len=160), tokenizer)
    with pytest.raises(PromptError, match="this model reads text only"):
        Chat(llama, Conversation(), SamplingOptions()).take("/image wide.png")
