"""python -m llm data-report: planted text is counted, and a page of it does nothing but be read."""

import json
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from llm.commands import data_report
from llm.errors import DataError, UsageError
from llm.measure.corpus import Census
from llm.quality import personal, rules
from llm.text.bpe import train_bpe
from llm.text.tokenizer import named_tokenizer

ENGLISH = (
    "The harbour was quiet when we came to the old house, and nobody had been there for years. "
    "It stood with its back to the sea. We did not have a key, so that we waited until the evening "
    "of the second day. Then a man who lived near the church brought us bread and told us stories. "
    "He said that the owner had left in winter. We thanked him, and he went away.\n"
)
CHINESE = (
    "春天来了,花园里的树木开始发芽。孩子们在河边放风筝,老人坐在长椅上聊天。"
    "远处传来钟声,提醒人们时间不早了。市场上卖菜的人把新鲜的蔬菜摆得整整齐齐。"
    "我们沿着小路慢慢走回家,一边走一边谈论昨天读过的书。晚饭以后,大家围着桌子听祖母讲故事。"
    "窗外下起了小雨,雨点轻轻敲打屋顶。\n"
)
PLANTED = {
    "email": ["mail anna.b@uni-example.org now", "邮箱zhang@qq.com联系"],
    "phone": [
        "call +44 20 7946 0958 today",
        "call (415) 555-2671",
        "手机13812345678联系",
        "电话+1 415 555 2671转",
    ],
    "ip": [
        "from 8.8.4.4 at noon",
        "从8.8.4.4登录",
        "服务器2001:4860:4860::8888 端口".replace("器2", "器 2"),
    ],
    "card": ["paid by 4111 1111 1111 1111", "卡号5500005555555559。"],
    "key": ["key AKIAIOSFODNN7EXAMPLE", "令牌ghp_" + "a1B2" * 9],
}
HARMLESS = [
    "version 1.2.3.4 of it", "at 12:30:45 on 2024-01-02", "card 4111 1111 1111 1112",
    "pi is 3.14159265358979", "std::vector<int> a@b", "192.168.0.1", "编号20240102030405",
    "sk-learn-estimator-html-doc-link-of-the-page",
]  # fmt: skip


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_personal_data_is_found_and_replaced(kind):
    for text in PLANTED[kind]:
        assert [found.kind for found in personal.find(text)] == [kind], text
        assert f"<{kind.upper()}>" in personal.redact(text, [kind])
        assert personal.redact(text, set(personal.KINDS) - {kind}) == text


def test_other_numbers_and_names_are_no_personal_data():
    assert [(text, [*personal.find(text)]) for text in HARMLESS if [*personal.find(text)]] == []


@pytest.mark.parametrize("preset", rules.RULES)
@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_prose_keeps_every_rule(preset, text):
    assert rules.failed(text, preset) is None


CLASSICS = Path(__file__).parents[2] / "shared" / "data" / "chinese_classics.txt"
# Verses of seven characters in lines of their own; and a refrain.
VERSES = (
    "蝶去莺飞无处问。\n隔水高楼望断鱼。\n恼乱层波横一寸。\n斜阳只与黄昏近。\n绮陌红楼往往经。\n帝里风光好当年。\n"
    "暮宴朝欢况有狂。\n江南好风景旧曾。\n日出江花红胜火。\n春来江水绿如蓝。\n山中相送罢日暮。\n空山新雨后天气。\n"
)
REFRAIN = "天涯何处无芳草。\n"


@pytest.mark.parametrize("text", [VERSES, VERSES[:54] + REFRAIN + VERSES[54:] + REFRAIN])
def test_what_is_normal_in_chinese_is_no_fault(text):
    """Short lines, and what a refrain repeats; the same lines over and over are one."""
    assert [(preset, rule.name, value) for preset, rule, value in rules.broken(text)] == []
    names = {rule.name for _, rule, _ in rules.broken(text + REFRAIN * 60)}
    assert {
        "characters in repeated 10-grams",
        "characters in repeated lines, without spaces",
    } <= names


@pytest.mark.skipif(not CLASSICS.is_file(), reason="the Chinese classics are not there")
def test_the_chinese_classics_keep_every_rule():
    text = CLASSICS.read_text("utf-8")
    pieces = [text[start : start + 5000] for start in range(0, len(text), 5000)]
    broken = [(n, rule.name) for n, one in enumerate(pieces) for _, rule, _ in rules.broken(one)]
    assert len(pieces) == 35 and broken == []


def test_words_and_repeated_runs_are_those_of_a_search_in_order():
    """A pattern of words, and loops over lists, on random text of letters, marks and signs."""
    marks = "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] == "M")
    word = re.compile(rf"[你の]|[^\W你の](?:[^\W你の]|[{marks}]|['’]+(?=[^\W你の]))*|[^\w\s]+")
    draw = random.Random(0)
    for size in [0, 1, 2, 5, *[200] * 60]:
        text = "".join(draw.choices("ab c'’\u0301\u0301_.!?\n é你 の1", k=size))
        words, expected = rules.Words(text), word.findall(text)
        found = [text[a : a + n] for a, n in zip(words.begins, words.sizes, strict=True)]
        assert found == expected, text
        assert len(set(zip(words.ids.tolist(), found, strict=True))) == len(set(found))
        measured = rules.Measured(text)
        n = 2 * (1 + measured.without_spaces)
        runs = [tuple(found[at : at + n]) for at in range(len(found) - n + 1)]
        size, place, seen = 0, 0, set()
        while place < len(runs):
            again = runs[place] in seen
            size += sum(map(len, runs[place])) * again
            seen.add(runs[place])
            place += n if again else 1
        assert measured.repeated_grams(2) == pytest.approx(size / max(len(text), 1))
        if runs:
            top, count = Counter(runs).most_common(1)[0]
            spaces = sum(one not in "你の" for one in top[:-1])
            share = (sum(map(len, top)) + spaces) * count / len(text)
            assert measured.top_gram(2) == pytest.approx(share)


BAD = {
    "short": "Too short to be judged.",
    "hashes": ENGLISH.replace(" ", " # "),
    "bullets": "".join(f"- {line}\n" for line in ENGLISH.split(". ")),
    "lines": ENGLISH + "the same line again and again\n" * 30,
    "brackets": ENGLISH.replace("sea.", "sea {here}."),
    "letters": ENGLISH + "12 34 56 78 90 " * 40,
    "paragraphs": "\n\n".join([ENGLISH] * 5),
    "no ends": "\n".join(ENGLISH.replace(".", "").split(" the ")),
    "latin": ENGLISH.replace("came to", "lorem ipsum"),
}


@pytest.mark.parametrize("name", ["fine", *BAD])
def test_verdicts_are_those_of_datatrove(name):
    filters = pytest.importorskip("datatrove.pipeline.filters")
    from datatrove.data import Document
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Ours(WordTokenizer):
        def word_tokenize(self, text):
            words = rules.Words(text)
            return [text[a : a + n] for a, n in zip(words.begins, words.sizes, strict=True)]

        def sent_tokenize(self, text):
            return rules.sentences(text)

        def span_tokenize(self, text):
            return [(0, len(part)) for part in rules.sentences(text)]

    text = BAD.get(name, ENGLISH)
    kinds = {
        "gopher": (filters.GopherQualityFilter, filters.GopherRepetitionFilter),
        "c4": (filters.C4QualityFilter,),
        "fineweb": (filters.FineWebQualityFilter,),
    }
    for preset, some in kinds.items():
        verdicts = [one(language=Ours()).filter(Document(text=text, id="0")) for one in some]
        keeps = all(verdict is True for verdict in verdicts)
        assert (rules.failed(text, preset) is None) == keeps, (preset, verdicts)


def test_the_report_counts_what_is_planted_and_its_page_is_harmless(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    nasty = "</table><script>alert(1)</script>\x1b[31m\u202e write to bob@mail-example.org"
    texts = {"a": ENGLISH, "b": ENGLISH, "c": CHINESE, "d": ENGLISH + nasty, "e": nasty}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    held_out = tmp_path / "eval.txt"
    held_out.write_text(CHINESE, encoding="utf-8")
    page = tmp_path / "page.html"
    words = [str(folder), "--json", "--html", str(page), "--against", str(held_out)]
    assert data_report.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["documents"] == 5
    assert report["bytes"] == report["tokens"] == sum(len(t.encode()) for t in texts.values())
    assert report["exact_duplicates"] == 1
    assert report["exact_duplicate_pairs"] == [["b.txt", "a.txt"]]
    # The one line of ENGLISH is in three documents, nasty's in two, and Chinese in one.
    shared = 3 * len(ENGLISH.strip()) + 2 * len(nasty)
    share = shared / (shared + len(CHINESE.strip()))
    assert report["repeated_line_share"] == pytest.approx(share)
    assert [one["documents"] for one in report["near_duplicates"]] == [["d.txt", "a.txt"]]
    assert report["near_duplicates"][0]["similarity"] >= 0.8
    assert report["personal_data"] == {"key": 0, "email": 2, "ip": 0, "card": 0, "phone": 0}
    assert report["quality"]["gopher: words"]["documents"] == 1
    assert report["characters"]["control"] == 2
    assert report["scripts"]["CJK"] == len(re.findall(r"[\u4e00-\u9fff]", CHINESE))
    assert [one["where"] for one in report["against"]] == ["c.txt"]
    shown = page.read_text("utf-8")
    assert "<script>alert" not in shown and "\x1b" not in shown and "\u202e" not in shown
    assert "bob@" not in shown and "&lt;EMAIL&gt;" in shown


def test_a_page_takes_no_document_s_place(tmp_path):
    paths = [tmp_path / name / "a.txt" for name in ("corpus", "evaluation")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(ENGLISH)
        words = [str(paths[0].parent), "--against", str(paths[1].parent), "--html", str(path)]
        with pytest.raises(UsageError, match=r"write over .*a\.txt, a document of the corpus"):
            data_report.main(words)
        assert path.read_text() == ENGLISH


def test_sources_without_text_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    binary = tmp_path / "binary.bin"
    binary.write_bytes(b"\0\1\2")
    for source in (tmp_path / "none", tmp_path / "empty", binary):
        with pytest.raises((DataError, UsageError), match=source.name):
            data_report.main([str(source)])


def test_held_out_text_that_training_has_is_found(tmp_path, capsys):
    """Two sources; a document that is held out stands in a longer one that is not."""
    from llm.text.documents import document_of
    from llm.text.splits import is_held_out

    def drawn(begins, held_out):
        texts = (f"{begins} number {n}.\n{ENGLISH}" for n in range(10_000))
        return next(t for t in texts if is_held_out(document_of("", t).sha256, 0.01) == held_out)

    for name, text in (("a", drawn("Report", True)), ("b", drawn("Letter", False))):
        (tmp_path / f"{name}.txt").write_text(text)
    assert data_report.main([str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["documents"] == 2 and report["split"] == {"held out": 1, "train": 1}
    (leak,) = report["validation"]
    assert (leak["name"], leak["where"]) == ("a.txt", "b.txt")
    assert 0.9 < leak["found"] / leak["grams"] < 1


def test_a_run_says_what_it_predicts_worst_and_best(unbroken, tmp_path, capsys, monkeypatch):
    """As the score command says of the same texts, of their first windows alone."""
    from llm.commands import score

    folder = tmp_path / "texts"
    folder.mkdir()
    known = (unbroken / "corpus.txt").read_text()
    texts = {f"{n}": known[40 * n : 40 * n + 20] for n in range(30)} | {"long": known[:500]}
    texts["<odd> & b"] = "".join(sorted(set(known))) * 3
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    page, run = tmp_path / "page.html", str(unbroken / "run")
    words = [str(folder), "--run", run, "--html", str(page), "--json", "--scored", "31"]
    assert data_report.main(words) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    bits = [one["bits_per_byte"] for one in model["documents"]]
    assert len(bits) == 31 and bits == sorted(bits, reverse=True)
    worst = model["documents"][0]
    assert worst["document"] == "<odd> & b.txt"
    for one in (worst, next(one for one in model["documents"] if one["cut"])):
        text = texts[one["document"].removesuffix(".txt")][: one["tokens"] + 1]
        assert score.main([run, "--text", text, "--json"]) == 0
        expected = json.loads(capsys.readouterr().out)["bits_per_byte"]
        assert one["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert one["document"] == "long.txt" and one["tokens"] == 16 + 8
    shown = page.read_text("utf-8")
    second = tmp_path / "page.documents.html"
    assert re.findall(r'href="([^"]*)"', shown) == [f"{second.name}#s{n}t0" for n in range(20)]
    assert (
        "&lt;odd&gt; &amp; b.txt" in shown and second.read_text("utf-8").count("<h2>Sample") == 20
    )

    second.unlink()
    second.symlink_to(folder / "1.txt")
    with pytest.raises(UsageError, match=r"write over .*page\.documents\.html, a document"):
        data_report.main(words)
    (folder / "unseen.txt").write_text("Q")
    for words in ([str(folder)], [run, "--tokenizer", "bytes"], [run]):
        with pytest.raises(UsageError, match=r"not a run|leave --tokenizer out|unseen\.txt: "):
            data_report.main([str(folder), "--run", *words])


def test_the_longest_tokens_are_those_of_several_bytes(tmp_path):
    """Of bytes none is."""
    census = Census(named_tokenizer("bytes"), 0.0)
    (tmp_path / "a.txt").write_text("A running dog.")
    census.read(data_report.Texts([str(tmp_path)], "text"))
    assert census.report()["tokenizer"]["longest"] == []
    made = train_bpe(["A running dog. " * 99], 270)
    census = Census(made, 0.0)
    census.read(data_report.Texts([str(tmp_path)], "text"))
    longest = census.report()["tokenizer"]["longest"]
    assert longest and all(len(token) > 1 for token in longest)
    assert longest == sorted(longest, key=len, reverse=True)
