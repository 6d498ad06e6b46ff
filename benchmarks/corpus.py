"""The report on a corpus: precision and recall of what it finds, its speed and its memory.

    python benchmarks/corpus.py [--data FOLDER]     what is planted in real text, and found
    python benchmarks/corpus.py --mib 200           data-report on plain files and on jsonl

Planted in English and in Chinese, at random places: personal data of every kind in many forms,
beside numbers and names that are none; copies of documents with words changed, whose similarity
sets of Python tell; passages and lines of evaluation text. The text is FOLDER/tinyshakespeare.txt
and FOLDER/chinese_classics.txt; if they are not there, words drawn from a vocabulary. Also how many
pieces of that text break which rules, and how often the language is told.

The text of --mib is that of benchmarks/duplicates.py, in lines and sentences: files of 1 MiB, and
documents of some 500 words. A process of its own reads each, and says its CPU time and peak memory.
"""

import argparse
import collections
import json
import random
import re
import resource
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FILES = {"English": "tinyshakespeare.txt", "Chinese": "chinese_classics.txt"}
PIECE, EACH = 3000, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=ROOT.parent / "shared" / "data", type=Path)
    parser.add_argument("--mib", type=int, default=0, help="measure speed and memory instead")
    options = parser.parse_args()
    if options.mib:
        large(options.mib)
        return
    for language, name in FILES.items():
        path, draw = options.data / name, random.Random(1)
        text = path.read_text("utf-8") if path.exists() else generated(language, draw)
        pieces = [text[at : at + PIECE] for at in range(0, len(text) - PIECE, PIECE)]
        print(f"{language}: {len(pieces)} pieces of {PIECE:,} characters ({path.name})")
        personal_data(pieces, draw, language == "Chinese")
        near_duplicates(pieces, draw)
        leaks(pieces, draw)
        rules_and_language(pieces)


def generated(language: str, draw: random.Random) -> str:
    signs = string.ascii_lowercase if language == "English" else [*map(chr, range(0x4E00, 0x5A00))]
    words = ["".join(draw.choices(signs, k=draw.randint(1, 8))) for _ in range(3000)]
    space, stop = (" ", ". ") if language == "English" else ("", "。")
    lines = (space.join(draw.choices(words, k=12)) + stop for _ in range(6000))
    return "\n".join(lines)


def share(part: int, whole: int) -> str:
    return f"{part / whole:.4f} ({part:,} of {whole:,})" if whole else "none"


def digits(draw: random.Random, count: int) -> str:
    return "".join(draw.choices(string.digits, k=count))


def token(
    draw: random.Random, count: int, signs: str = string.ascii_letters + string.digits
) -> str:
    """Random signs, a digit among them."""
    return "".join(draw.choices(signs, k=count - 1)) + draw.choice(string.digits)


def card(draw: random.Random, valid: bool = True) -> str:
    """A card number of a known issuer; its check digit by the sum of ISO 7812, annex B."""
    begin, count = draw.choice([("4", 16), ("51", 16), ("55", 16), ("6222", 16), ("34", 15)])
    body = begin + digits(draw, count - len(begin) - 1)
    total = sum(
        n if place % 2 else n * 2 - 9 * (n > 4) for place, n in enumerate(map(int, reversed(body)))
    )
    number = body + str((-total + (0 if valid else draw.randint(1, 9))) % 10)
    separator = draw.choice(["", " ", "-"])
    return separator.join(re.findall(".{1,4}", number)) if count == 16 else number


def address(draw: random.Random) -> str:
    """An address of the public internet, in version 4 or 6."""
    if draw.random() < 0.3:
        return "2a00:1450:" + ":".join(f"{draw.randrange(1, 65536):x}" for _ in range(6))
    first = draw.choice([8, 23, 52, 81, 114, 142, 151, 185])
    return f"{first}.{draw.randrange(1, 255)}.{draw.randrange(256)}.{draw.randrange(1, 255)}"


def email(draw: random.Random) -> str:
    names = ["anna.berg", "li_wei", "zhang88", "j-p.sartre", "info", "M.Curie+lab", "x%y"]
    hosts = ["example.org", "mail.uni-berlin.de", "163.com", "qq.com", "a-b.co.uk", "firma.museum"]
    return f"{draw.choice(names)}{draw.randrange(1000)}@{draw.choice(hosts)}"


def phone(draw: random.Random) -> str:
    area, office, line = draw.randint(201, 989), draw.randint(201, 989), digits(draw, 4)
    mobile = f"1{draw.randint(3, 9)}{digits(draw, 9)}"
    pairs = " ".join(digits(draw, 2) for _ in range(4))
    city = f"{draw.randint(2, 8)}{digits(draw, 7)}"
    return draw.choice([
        f"({area}) {office}-{line}", f"{area}-{office}-{line}", f"1-{area}-{office}-{line}",
        f"+1 {area} {office} {line}", f"+44 20 7{digits(draw, 3)} {line}", f"+33 1 {pairs}",
        f"+49 (0)30 {digits(draw, 6)}", f"+86 {mobile}", mobile, f"010-{city}", f"(021) {city}",
        f"{mobile[:3]}-{mobile[3:7]}-{mobile[7:]}", f"{mobile[:3]} {mobile[3:7]} {mobile[7:]}",
    ])  # fmt: skip


def key(draw: random.Random) -> str:
    upper = string.ascii_uppercase + string.digits
    return draw.choice([
        "AKIA" + token(draw, 16, upper), "ghp_" + token(draw, 36), "sk-" + token(draw, 48),
        "sk-proj-" + token(draw, 60), "xoxb-" + digits(draw, 12) + "-" + token(draw, 24),
        "AIza" + token(draw, 35), "hf_" + token(draw, 34), "glpat-" + token(draw, 20),
        f"eyJ{token(draw, 30)}.eyJ{token(draw, 60)}.{token(draw, 43)}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{token(draw, 64)}\n-----END RSA PRIVATE KEY-----",
    ])  # fmt: skip


PERSONAL: dict[str, Callable[[random.Random], str]] = {
    "email": email, "phone": phone, "ip": address, "card": card, "key": key
}  # fmt: skip


def harmless(draw: random.Random) -> str:
    """Numbers and names as text has them."""
    year, n, minute = draw.randint(1500, 2030), draw.randint(1, 28), draw.randint(10, 59)
    three, five = digits(draw, 3), digits(draw, 5)
    return draw.choice([
        f"{year}-11-{n:02}", f"{n}:{minute}:{minute}", f"{three}.{minute}", f"{n},{three},{three}",
        f"192.168.{n}.{minute}", f"127.0.0.{n}", f"version 1.{n}.3.{minute}", f"{n}%",
        f"ISBN 978-{n % 10}-{three}-{five}-{n % 7}", f"{year}11{n:02}{five}0", f"pp. {n}-{n + 20}",
        f"{year}年{n}日", f"第{five}号", "sk-learn-estimator-html-doc-link", "std::vector<int>",
        "@property", "name @ home", card(draw, valid=False), f"0x{token(draw, 8, 'abcdef')}",
        f"{n % 10}.{digits(draw, 14)}", f"#{five}",
        f"ACL-{year}-{five}", f"GB/T {five}-{year}", f"{year}/{n}/11", f"{five}-{five}",
    ])  # fmt: skip


# Forms that no pattern was written for: found or not, and, if it is no personal data, wrongly so.
UNPLANNED: dict[str, Callable[[random.Random], str]] = {
    "telephones in their national form": lambda d: d.choice(
        [f"020 7{digits(d, 3)} {digits(d, 4)}", f"030/{digits(d, 6)}", f"06 {digits(d, 8)}"]
    ),
    "telephones of ten digits without a break": lambda d: f"415{digits(d, 7)}",
    "e-mail addresses in other letters": lambda d: f"李{d.randrange(99)}@例子.公司",
    "secret keys of AWS, 40 signs": lambda d: token(d, 40, string.ascii_letters + "/+"),
    "wrong: 16 random digits after a 4": lambda d: f"4{digits(d, 15)}",
    "wrong: section 8.n.n.n": lambda d: f"8.{d.randint(1, 9)}.{d.randint(1, 9)}.{d.randint(1, 9)}",
}


def personal_data(pieces: list[str], draw: random.Random, chinese: bool) -> None:
    """Found is what has a planted thing's place and kind; anything else that is found is wrong."""
    from llm.quality import personal

    planted, found, right = (collections.Counter[str]() for _ in range(3))
    for kind in [*PERSONAL, "none"]:
        for _ in range(EACH if kind != "none" else 5 * EACH):
            thing = harmless(draw) if kind == "none" else PERSONAL[kind](draw)
            piece = draw.choice(pieces)
            at = draw.choice(
                [m.end() for m in re.finditer(r"[,.;:,。;:]\s?" if chinese else r"\s", piece)]
            )
            # Chinese text is often set without a space beside Latin letters and digits.
            space = draw.choice(["", " "]) if chinese else " "
            before = piece[:at] + space
            text = before + thing + space + piece[at:]
            planted[kind] += 1
            for one in personal.find(text):
                found[one.kind] += 1
                place = (one.start, one.end) == (len(before), len(before) + len(thing))
                right[one.kind] += one.kind == kind and place
    for kind in PERSONAL:
        precision, recall = share(right[kind], found[kind]), share(right[kind], planted[kind])
        print(f"  {kind}: precision {precision}, recall {recall}")
    for name, form in UNPLANNED.items():
        some = sum(any(personal.find(f"see {form(draw)} for it")) for _ in range(EACH))
        print(f"  {name}: {share(some, EACH)} are found")


def units(text: str) -> list[str]:
    """Words of English, characters of Chinese, by a pattern that is not ours."""
    return re.findall(r"[^\W\u3400-\u9fff_]+|[\u3400-\u9fff]", text.lower())


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    every = units(text)
    return {tuple(every[at : at + length]) for at in range(max(1, len(every) - length + 1))}


def near_duplicates(pieces: list[str], draw: random.Random) -> None:
    """Each piece, and a copy with one unit in n replaced; near are those of 0.8 and more."""
    from llm.quality.duplicates import SIMILAR, Sketch, find_duplicates

    texts = pieces[:150]
    words = units("".join(texts))
    changed = []
    for text in texts:
        rate = draw.choice([0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1])
        pattern = r"[^\W\u3400-\u9fff_]+|[\u3400-\u9fff]"
        changed.append(
            re.sub(
                pattern, lambda m, r=rate: draw.choice(words) if draw.random() < r else m[0], text
            )
        )
    with tempfile.TemporaryDirectory() as folder:
        with Sketch(Path(folder), near=True) as sketch:
            for number, text in enumerate([*texts, *changed]):
                sketch.add(text, f"{number:032x}" * 2)
        found = find_duplicates([Path(folder)], near=True)
    sets = [runs(text, 5) for text in [*texts, *changed]]
    near = {
        (a, b)
        for a in range(len(sets))
        for b in range(a)
        if len(sets[a] & sets[b]) >= SIMILAR * len(sets[a] | sets[b])
    }
    pairs = {*map(tuple, found.near.tolist())}
    right = len(pairs & near)
    print(
        f"  near duplicates: precision {share(right, len(pairs))}, recall {share(right, len(near))}"
    )


def leaks(pieces: list[str], draw: random.Random) -> None:
    """Evaluation documents from the end of the text; a passage of every second one is planted."""
    from llm.measure.overlap import GRAM, SHORTEST, Overlap

    half = len(pieces) // 2
    evaluation = [(str(n), piece[: PIECE // 2]) for n, piece in enumerate(pieces[half:])]
    known = set[tuple[str, ...]]().union(*(runs(piece, GRAM) for piece in pieces[:half]))
    overlap, leaked = Overlap(evaluation), set()
    for number, piece in enumerate(pieces[:half]):
        name, text = evaluation[number % len(evaluation)]
        if number % 2:
            lines = [line for line in text.split("\n") if SHORTEST < len(units(line)) < GRAM]
            at = draw.randrange(len(text) // 2)
            passage = draw.choice(lines) if lines and number % 4 == 1 else text[at : at + 200]
            leaked.add(name)
            piece = f"{piece[: PIECE // 2]}\n{passage}\n{piece[PIECE // 2 :]}"
        overlap.read(str(number), piece)
    found = {leak.name for leak in overlap.found()}
    # The text repeats itself too: what a search in sets, and for whole short lines, finds is right.
    short = {
        tuple(units(line))
        for piece in pieces[:half]
        for line in piece.split("\n")
        if SHORTEST <= len(units(line)) < GRAM
    }
    for name, text in evaluation:
        if runs(text, GRAM) & known or {tuple(units(line)) for line in text.split("\n")} & short:
            leaked.add(name)
    right = len(found & leaked)
    print(f"  leaks: precision {share(right, len(found))}, recall {share(right, len(leaked))}")


def rules_and_language(pieces: list[str]) -> None:
    from llm.measure.corpus import LANGUAGE_CHARACTERS
    from llm.quality import personal
    from llm.quality.rules import broken

    size, speed = len("".join(pieces).encode()) / 1e6, []
    for look in (broken, personal.find):
        [*look(pieces[0])]  # builds its tables
        start = time.process_time()
        for piece in pieces:
            collections.deque(look(piece), maxlen=0)
        speed.append(f"{size / (time.process_time() - start):.1f} MB/s")
    print(f"  speed: rules {speed[0]}, personal data {speed[1]}")
    found = collections.Counter(
        (preset, rule.name) for piece in pieces for preset, rule, _ in broken(piece)
    )
    for (preset, name), count in found.most_common():
        print(f"  rule {preset}, {name}: {count:,} pieces break it")
    if not found:
        print("  rules: no piece breaks one")
    try:
        import py3langid
    except ImportError:
        return
    told = collections.Counter(py3langid.classify(p[:LANGUAGE_CHARACTERS])[0] for p in pieces)
    print(f"  languages: {dict(told.most_common(5))}")


def large(mib: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for kind, write in (("plain", plain), ("jsonl", jsonl)):
            size = write(Path(folder) / kind, mib * 2**20) / 1e6
            command = [
                sys.executable,
                "-m",
                "llm",
                "data-report",
                str(Path(folder) / kind),
                "--json",
            ]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            start = time.perf_counter()
            said = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
            wall = time.perf_counter() - start
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            report = json.loads(said)
            print(
                f"{kind}: {report['documents']:,} documents, {size:.0f} MB in {wall:.0f} s, "
                f"{cpu:.0f} s of CPU, {size / cpu:.2f} MB/s of CPU; "
                f"peak {after.ru_maxrss / 2**20:.2f} GiB; "
                f"{report['near_duplicate_documents']:,} near duplicates",
                flush=True,
            )


def documents(size: int) -> Iterator[str]:
    """Sentences of 12 words, in lines of 5."""
    from duplicates import texts

    for text in texts(size):
        words = text.split(" ")
        sentences = [f"{' '.join(words[at : at + 12])}." for at in range(0, len(words), 12)]
        yield "\n".join(" ".join(sentences[at : at + 5]) for at in range(0, len(sentences), 5))


def plain(folder: Path, size: int) -> int:
    folder.mkdir()
    held, written = [], 0
    for text in documents(size):
        held.append(text)
        if sum(map(len, held)) >= 2**20:
            written += (folder / f"{written}.txt").write_text("\n".join(held))
            held = []
    return written


def jsonl(folder: Path, size: int) -> int:
    folder.mkdir()
    with open(folder / "all.jsonl", "w") as file:
        return sum(file.write(json.dumps({"text": text}) + "\n") for text in documents(size))


if __name__ == "__main__":
    main()
