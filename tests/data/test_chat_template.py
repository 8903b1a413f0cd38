"""data.chat_template: names, files and texts of templates, and what is no template."""

from __future__ import annotations

from pathlib import Path

import pytest

from dylora_mlx.data import rendering
from dylora_mlx.data.chat_template import describe_format, resolve_template, stored_template
from dylora_mlx.data.rendering import BUILTIN_TEMPLATES, SkillFormat
from dylora_mlx.errors import UserError

TEXT = "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}\n{% endfor %}"


def test_none_is_the_bases_own():
    assert resolve_template(None) is None
    assert stored_template(None) is None


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_a_name(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text(TEXT)  # a file of that name does not count
    monkeypatch.chdir(tmp_path)
    assert resolve_template(name) == rendering.builtin_template(name)
    assert stored_template(name) == name


@pytest.mark.parametrize("text", [
    TEXT, "{{ messages }}", "{% generation %}{{ messages }}{% endgeneration %}", "{%- for m in messages %}{% break %}{% endfor %}",
    "{{ messages | tojson(indent=1) }}{{ strftime_now('%d') }}{{ raise_exception('no') }}", "{% set x = namespace(a=1) %}",
])  # fmt: skip
def test_a_text_stays_as_it_is(text):
    assert resolve_template(text) == stored_template(text) == text


@pytest.mark.parametrize("name", ["chat.jinja", "chat_template.txt", "no ending", "chatml.jinja"])
@pytest.mark.parametrize(
    "content", [TEXT.encode(), b"\xef\xbb\xbf" + TEXT.encode(), TEXT.replace("\n", "\r\n").encode()]
)
def test_a_file_is_its_text(tmp_path, monkeypatch, name, content):
    (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    for value in (name, str(tmp_path / name)):
        assert resolve_template(value) == stored_template(value) == TEXT


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.jinja").write_text(TEXT)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_template("~/mine.jinja") == TEXT


@pytest.mark.parametrize(("text", "message"), [
    ("{% for m in messages %}", "data.chat_template, line 1: not a Jinja template (Unexpected end of template."),
    ("a\nb\n{{ m | nosuch }}", "data.chat_template, line 3: not a Jinja template (No filter named 'nosuch'.)"),
    ("{{ x", "data.chat_template, line 1: not a Jinja template (unexpected end of template"),
    ("{% nosuch %}", "data.chat_template, line 1: not a Jinja template (Encountered unknown tag 'nosuch'.)"),
    ("{% generation %}{{ x }}", "data.chat_template, line 1: not a Jinja template (Unexpected end of template."),
    ("{% endgeneration %}", "data.chat_template, line 1: not a Jinja template (Encountered unknown tag 'endgeneration'.)"),
    ("{{" * 3000, "data.chat_template: not a Jinja template (RecursionError)"),
])  # fmt: skip
def test_a_text_that_is_no_template(text, message, tmp_path):
    with pytest.raises(UserError) as raised:
        resolve_template(text)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
    path = tmp_path / "chat.jinja"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        resolve_template(str(path))
    assert str(raised.value).startswith(message.replace("data.chat_template", str(path)))


CHOICES = "data.chat_template is gemma, chatml, a file, or the text of a template"
FILES = [
    (lambda path: None, f"no such file; {CHOICES}"),
    (lambda path: path.mkdir(), f"cannot be read (Is a directory); {CHOICES}"),
    (lambda path: path.write_bytes(TEXT.encode("utf-16")), "not UTF-8; convert the file (data.chat_template)"),
    (
        lambda path: path.write_text("no tags"),
        "no chat template, there is neither {% nor {{ in it (data.chat_template)",
    ),
    (lambda path: path.touch(), "no chat template, there is neither {% nor {{ in it (data.chat_template)"),
]


@pytest.mark.parametrize(("make", "message"), FILES)
def test_a_file_that_is_no_template(tmp_path, make, message):
    path = tmp_path / "chat.jinja"
    make(path)
    for resolve in (resolve_template, stored_template):
        with pytest.raises(UserError) as raised:
            resolve(str(path))
        assert str(raised.value) == f"{path}: {message}"


@pytest.mark.parametrize("value", ["Gemma", "chatml2", "a\0b", "x" * 5000])
def test_a_name_that_is_none(value):
    with pytest.raises(UserError, match=r"data\.chat_template is gemma, chatml"):
        resolve_template(value)
    with pytest.raises(UserError) as raised:
        stored_template(value)
    assert len(str(raised.value)) < 400


def test_nothing_of_a_template_is_run(tmp_path):
    path = tmp_path / "written"
    code = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ open('" + str(path) + "', 'w') }}{{ 1 / 0 }}"
    assert resolve_template(code) == code
    assert not path.exists()


def hashed(text: str) -> SkillFormat:
    return SkillFormat("chat", rendering.template_hash(text))


@pytest.mark.parametrize(("form", "chosen", "words"), [
    (SkillFormat("plain"), None, "plain text"),
    (SkillFormat("prompt"), "gemma", "prompts and completions"),
    (hashed(TEXT), None, "chats in the base's own template"),
    (hashed(TEXT), TEXT, "chats in the template of data.chat_template"),
    (hashed(TEXT), "chatml", "chats in the base's own template"),
    (hashed(rendering.builtin_template("chatml")), "chatml", "chats in the chatml template that comes with the package"),
    (hashed(rendering.builtin_template("gemma")), None, "chats in the gemma template that comes with the package"),
])  # fmt: skip
def test_forms_in_words(form, chosen, words):
    assert describe_format(form, chosen) == words


def test_a_relative_file_means_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/chat.jinja").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert resolve_template("sub/chat.jinja") == resolve_template(str(Path("sub") / ".." / "sub/chat.jinja")) == TEXT
