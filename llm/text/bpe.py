"""A byte-pair vocabulary trained on the corpus.

Hugging Face `tokenizers` counts and merges. The result runs in tiktoken like every other encoding,
so one implementation encodes both in training and, years later, in sampling.

Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units"; at
byte level, Radford et al. 2019.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait

from llm.errors import UsageError
from llm.text.cache import OnProgress, silent
from llm.text.tokenizer import END_OF_TEXT, BytePairTokenizer, byte_of_symbol

# GPT-4's pattern with single digits, which is the one that llama.cpp calls "bailingmoe". Numbers of
# two digits, as in nanochat's tokenizer.py, save 0.2 % of the tokens of Python at 4,096 tokens and
# 0.6 % at 16,384, none of Shakespeare's, and travel nowhere. Older vocabularies keep their pattern.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# More text would change a vocabulary little, and every distinct word is kept in memory. nanochat
# trains 65,536 tokens on 2e9 characters; our vocabularies are smaller by default.
TRAINING_CHARACTERS = 2**28

# A merge rewrites every word that has its pair, so that its time grows with the length of a word.
# Without word breaks (letters of DNA, base64, Chinese without punctuation) a whole piece of text is
# one word: 4,096 tokens then take 17 to 65 s a million characters, and 1 to 2 s in parts of this
# length. Words of languages are shorter, so that their vocabularies stay as they are.
LONGEST_WORD = 256

# Text with fewer than one word break in so many characters hardly repeats a word, and each distinct
# word stays in memory: about 190 bytes a character. It counts as so many times its length.
UNBROKEN = 16

# Between two looks at whether the training of a vocabulary is to stop.
POLL_SECONDS = 0.2

# All bytes, and the end of text.
SMALLEST_VOCABULARY = 257


def train_bpe(
    texts: Iterable[str], vocab_size: int, on_progress: OnProgress = silent
) -> BytePairTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, the end of text last.

    Args:
      texts: the corpus in pieces; only its first TRAINING_CHARACTERS characters are used.
      vocab_size: counts all bytes, the merges and the end of text. A corpus that is too small for
        that many merges gives fewer tokens.
      on_progress: called while merges are chosen; an exception from it stops the training.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"tokenizer.vocab_size = {vocab_size}: expected at least {SMALLEST_VOCABULARY}, which "
            "is every byte and the end of text"
        )
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.Split(Regex(rf"(?m:.){{{LONGEST_WORD}}}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    first = _first(texts, TRAINING_CHARACTERS)
    _stoppable(lambda texts: model.train_from_iterator(texts, trainer), first, on_progress)
    byte_of = byte_of_symbol()
    ranks = {bytes(byte_of[c] for c in token): id_ for token, id_ in model.get_vocab().items()}
    return BytePairTokenizer("bpe", PATTERN, ranks, {END_OF_TEXT: len(ranks)})


def _first(texts: Iterable[str], characters: int) -> Iterable[str]:
    for text in texts:
        if characters <= 0:
            return
        yield text[:characters]
        breaks = text.count(" ") + text.count("\n")
        characters -= len(text) * (UNBROKEN if breaks * UNBROKEN < len(text) else 1)


def _stoppable(
    train: Callable[[Iterable[str]], object], texts: Iterable[str], on_progress: OnProgress
) -> None:
    """`train(texts)` in a thread of its own: the library chooses all merges in one call, in which
    Python hears no signal. If on_progress raises, that call is left to end by itself.
    """
    all_read, done = threading.Event(), Future[None]()

    def pieces() -> Iterable[str]:
        yield from texts
        all_read.set()

    def run() -> None:
        try:
            train(pieces())
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="vocabulary", daemon=True).start()
    while not wait([done], POLL_SECONDS).done:
        if all_read.is_set():
            on_progress("choosing merges", 0, None)
    done.result()
