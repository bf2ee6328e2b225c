"""The page in a real browser, as a person uses it. Skipped where Chromium or playwright is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("axe_playwright_python")
pytest.importorskip("playwright")
pytest.importorskip("prometheus_client")
pytest.importorskip("pydantic")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from browsing import each_scheme, each_screen, excess_width, problems
from browsing import opened as opened_at
from playwright.sync_api import Browser, Page, expect
from served import Host

from mlx_randygpt.dialogue import Turn, render_prompt
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import generate
from mlx_randygpt.serve import Settings

pytestmark = pytest.mark.slow


@pytest.fixture
def host(make_run: Callable[..., Any]) -> Iterator[Host]:
    host = Host(*make_run("modern", prompt="The old"))
    host.start()
    yield host
    host.stop()


@pytest.fixture
def page(browser: Browser, host: Host) -> Iterator[Page]:
    yield from opened(browser, host)


def opened(browser: Browser, host: Host, **context: Any) -> Iterator[Page]:
    """A page that has learned of the model; nothing may have gone wrong on it at the end."""
    page = browser.new_context(**context).new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith(host.url) or wrong.append(asked.url))
    page.on("console", lambda said: "Content Security" not in said.text or wrong.append(said.text))
    page.goto(host.url)
    expect(page.locator("#facts")).to_contain_text("parameters")
    yield page
    page.context.close()
    assert wrong == []


def set_slider(page: Page, name: str, value: float) -> None:
    page.locator(f"#{name}").fill(str(value))


def write(page: Page, prompt: str, seed: int) -> str:
    """Type, write, wait; the text without the prompt."""
    page.locator("#prompt").fill(prompt)
    page.locator("#seed").fill(str(seed))
    page.locator("#keep-seed").check()
    page.locator("#write").click()
    expect(page.locator("#write")).to_be_enabled()
    expect(page.locator("#status")).to_contain_text("tokens")
    return str(page.locator("#text").text_content()).removeprefix(prompt)


def test_what_is_written_is_the_text_of_the_command(page: Page, host: Host) -> None:
    set_slider(page, "max_tokens", 40)
    assert write(page, "The king", 7) == host.text("The king", seed=7, max_tokens=40)
    expect(page.locator("#command")).to_have_text(
        "mlxgpt sample --prompt 'The king' --max-tokens 40"
        " --checkpoint 'my runs/tale.safetensors' --seed 7"
    )


def test_the_longest_seed_is_shown_whole(page: Page) -> None:
    page.locator("#seed").fill("9007199254740991")
    assert page.locator("#seed").evaluate("field => field.scrollWidth <= field.clientWidth")
    row, button = (page.locator(name).bounding_box() for name in ("#sliders", "#dice"))
    assert button["x"] + button["width"] <= row["x"] + row["width"]


def test_layers_and_heads_count_from_one(page: Page, host: Host) -> None:
    for name, n in (("layer", host.run.model.n_layer), ("head", host.run.model.n_head)):
        names = page.locator(f"#{name} option").all_text_contents()
        assert names == [str(i) for i in range(1, n + 1)]


def test_a_slider_changes_the_text(page: Page, host: Host) -> None:
    set_slider(page, "max_tokens", 30)
    set_slider(page, "temperature", 0)
    set_slider(page, "top_k", 5)
    assert write(page, "A", 7) == host.text("A", seed=7, max_tokens=30, temperature=0, top_k=5)


def test_a_stream_is_seen_and_stopped_with_the_keyboard(page: Page, host: Host) -> None:
    page.locator("#max_tokens").evaluate("slider => { slider.max = 30000; slider.value = 30000 }")
    set_slider(page, "temperature", 0)  # repeats itself and does not end
    page.locator("#prompt").focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#text .token").nth(30)).to_be_attached()
    expect(page.locator("#stop")).to_be_enabled()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_contain_text("stopped after")
    expect(page.locator("#write")).to_be_enabled()


def test_a_text_is_begun_again_with_the_keyboard(page: Page) -> None:
    set_slider(page, "max_tokens", 9)
    page.locator("#prompt").focus()
    page.keyboard.press("Tab")
    for _ in range(2):
        before = page.locator("#command").text_content()
        page.keyboard.press("Enter")
        expect(page.locator("#command")).not_to_have_text(str(before))
        expect(page.locator("#write")).to_be_focused()


def test_tab_passes_every_control_in_order(page: Page) -> None:
    set_slider(page, "max_tokens", 9)
    write(page, "The", 3)
    page.locator("#theme").focus()
    passed = ["theme"]
    while passed[-1] and len(passed) < 40:
        if passed[-1] in ("attention", "run"):
            page.keyboard.press("Enter")  # open it
        page.keyboard.press("Tab")
        passed.append(page.evaluate("document.activeElement.closest('[id]')?.id ?? ''"))
    desk = "theme prompt write onward text attention layer head map run curve"
    sliders = "max_tokens temperature top_p top_k min_p typical_p repetition_penalty"
    assert passed == [*desk.split(), *sliders.split(), "seed", "dice", "keep-seed", "copy", ""]


def test_tokens_tell_what_they_might_have_been(page: Page) -> None:
    set_slider(page, "max_tokens", 30)
    write(page, "The", 3)
    page.locator("#text").focus()
    page.keyboard.press("ArrowRight")
    first = page.locator("#choice").inner_text()
    assert "instead of" in first
    page.keyboard.press("End")
    assert page.locator("#choice").inner_text() != first
    page.locator("#text .token").first.hover()
    expect(page.locator("#choice")).to_have_text(first)


def test_attention_of_a_head_is_shown_for_the_chosen_token(page: Page) -> None:
    set_slider(page, "max_tokens", 12)
    write(page, "The", 3)
    page.locator("#attention summary").click()
    expect(page.locator("#shares")).to_contain_text("attends to")
    before = page.locator("#shares").inner_text()
    page.locator("#head").select_option("2")
    expect(page.locator("#shares")).not_to_have_text(before)
    page.locator("#map").focus()
    page.keyboard.press("Home")
    expect(page.locator("#shares")).to_contain_text("itself 100 %")


def test_the_loss_of_the_run_is_drawn(page: Page) -> None:
    page.locator("#run summary").click()
    expect(page.locator("#curve polyline")).to_have_count(2)
    expect(page.locator("#curve svg")).to_have_attribute(
        "aria-label", "Loss from 3.00 down to 2.00 in 3 steps"
    )


def test_the_loss_at_a_step_is_read_by_keyboard_and_pointer(page: Page) -> None:
    page.locator("#run summary").click()
    values = page.locator("#curve-values")
    expect(values).to_have_text("step 3 training 2.0000 · validation 2.2000 at step 3")
    page.locator("#curve").focus()
    page.keyboard.press("Home")
    expect(values).to_have_text("step 1 training 3.0000 · validation 3.1000 at step 0")
    width = page.locator("#curve svg").bounding_box()["width"]
    page.locator("#curve svg").hover(position={"x": width - 20, "y": 50})
    expect(values).to_contain_text("step 3")


def test_the_command_is_copied(page: Page, host: Host) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=host.url)
    set_slider(page, "max_tokens", 5)
    write(page, "The", 3)
    page.locator("#copy").click()
    expect(page.locator("#status")).to_have_text("The command is copied.")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.locator("#command").text_content()


def test_two_tabs_write_side_by_side(page: Page, host: Host) -> None:
    other = page.context.new_page()
    other.goto(host.url)
    expect(other.locator("#facts")).to_contain_text("parameters")
    for tab, seed in ((page, 1), (other, 2)):
        set_slider(tab, "max_tokens", 300)
        tab.locator("#seed").fill(str(seed))
        tab.locator("#keep-seed").check()
    page.locator("#write").click()
    other.locator("#write").click()
    for tab, seed in ((page, 1), (other, 2)):
        expect(tab.locator("#write")).to_be_enabled()
        expect(tab.locator("#status")).to_contain_text("tokens")
        expected = "The old" + host.text("The old", seed=seed, max_tokens=300)
        assert tab.locator("#text").text_content() == expected


def test_a_server_that_went_away_and_came_back_is_noticed(page: Page, host: Host) -> None:
    host.stop()
    page.locator("#write").click()
    expect(page.locator("#status")).to_contain_text("The server does not respond")
    host.start()
    expect(page.locator("#status")).to_have_text("The server is back.", timeout=20_000)
    set_slider(page, "max_tokens", 20)
    assert write(page, "A", 4) == host.text("A", seed=4, max_tokens=20)


def test_a_key_is_asked_for(browser: Browser, make_run: Callable[..., Any]) -> None:
    host = Host(*make_run("modern"), settings=Settings(api_key="s3cret"))
    host.start()
    try:
        page = browser.new_context().new_page()
        page.goto(host.url)
        page.locator("#key").fill("s3cret")
        page.locator("#key").press("Enter")
        expect(page.locator("#facts")).to_contain_text("parameters")
        expect(page.locator("#key-row")).to_be_hidden()
        page.context.close()
    finally:
        host.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_light_and_dark(
    scheme: Any, browser: Browser, host: Host
) -> None:
    size = {"width": 360, "height": 740}
    for page in opened(browser, host, viewport=size, color_scheme=scheme, has_touch=True):
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")
        page.locator("#theme").tap()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
        set_slider(page, "max_tokens", 20)
        write(page, "The", 1)
        page.locator("#text .token").first.tap()
        expect(page.locator("#choice")).to_contain_text("instead of")


@pytest.fixture
def dialogue(browser: Browser, dialogue_run: Callable[..., Any]) -> Iterator[tuple[Page, Host]]:
    host = Host(*dialogue_run())
    host.start()
    for page in opened(browser, host):
        yield page, host
    host.stop()


def send(page: Page, text: str, button: str = "#write") -> str:
    """Send a message and wait; the answer."""
    if button == "#write":
        page.locator("#prompt").fill(text)
    page.locator(button).click()
    expect(page.locator("#write")).to_be_enabled()
    expect(page.locator("#status")).to_contain_text("tokens")
    return str(page.locator("#text .assistant").last.text_content())


def answer_to(host: Host, turns: list[Turn], seed: int) -> str:
    run, config = host.run, SampleConfig(seed=seed, max_tokens=9)
    ids = render_prompt(turns, run.tokenizer).tolist()
    *_, [sample] = generate(host.backend, run.model, run.tokenizer, ids, config)
    return sample.text


def test_a_conversation_with_a_model_of_dialogue(dialogue: tuple[Page, Host]) -> None:
    page, host = dialogue
    set_slider(page, "max_tokens", 9)
    page.locator("#seed").fill("7")
    page.locator("#keep-seed").check()
    page.locator("#system").fill("Sing.")
    turns = [Turn("system", "Sing."), Turn("user", "king")]
    first = send(page, "king")
    assert first == answer_to(host, turns, 7)
    expect(page.locator("#prompt")).to_have_value("")
    turns += [Turn("assistant", first), Turn("user", "moon")]
    assert send(page, "moon") == answer_to(host, turns, 7)
    page.locator("#seed").fill("8")
    assert send(page, "", "#onward") == answer_to(host, turns, 8)
    assert page.locator("#text .user").all_text_contents() == ["king", "moon"]
    assert page.locator("#text .assistant").count() == 2
    expect(page.locator("#command")).to_have_text(
        "mlxgpt chat --max-tokens 9 --checkpoint 'my runs/tale.safetensors' --seed 8"
    )
    page.locator("#attention summary").click()
    expect(page.locator("#map")).to_contain_text("<|system|>Sing.<|end|><|user|>king<|end|>")
    page.locator("#again").click()
    expect(page.locator("#text")).to_be_empty()
    assert send(page, "king") == answer_to(host, turns[:2], 8)


def test_a_notice_stands_before_the_answer_that_it_is_about(dialogue: tuple[Page, Host]) -> None:
    page, _ = dialogue
    set_slider(page, "max_tokens", 9)
    send(page, "The old red ship sleeps")
    send(page, "a small grey bird runs over")
    expect(page.locator("#text .notice")).to_contain_text("2 oldest messages")
    kinds = page.locator("#text .turn").evaluate_all("nodes => nodes.map(n => n.className)")
    roles = " ".join(kind.split()[-1] for kind in kinds)
    assert roles == "user assistant user notice assistant"


def test_a_message_that_is_refused_is_given_back(dialogue: tuple[Page, Host]) -> None:
    page, _ = dialogue
    set_slider(page, "max_tokens", 9)
    send(page, "king")
    page.locator("#prompt").fill("a" * 70)
    page.locator("#write").click()
    expect(page.locator("#status")).to_contain_text("context is 64 tokens")
    expect(page.locator("#prompt")).to_have_value("a" * 70)
    assert page.locator("#text .user").all_text_contents() == ["king"]


@each_scheme
@each_screen
def test_it_is_accessible(size: tuple[int, int], scheme: str, browser: Browser, host: Host) -> None:
    for page in opened_at(browser, host.url, size, scheme):
        expect(page.locator("#facts")).to_contain_text("parameters")
        assert problems(page) == []
        set_slider(page, "max_tokens", 30)
        write(page, "The", 3)
        for name in ("attention", "run"):
            page.locator(f"#{name} summary").click()
        expect(page.locator("#shares")).to_contain_text("attends to")
        expect(page.locator("#curve svg")).to_be_visible()
        assert problems(page) == []
        assert excess_width(page) == 0
