"""A dataset from text of your own: text files, JSON lines, tables, parquet files, to data/NAME.

    python data/text/prepare.py book.txt                # to data/book
    python data/text/prepare.py notes --name=diary --tokenizer=char
    python data/text/prepare.py --input=notes --tokenizer=bpe --vocab_size=4096
    python data/text/prepare.py posts.csv --field=content
    python data/text/prepare.py qa.jsonl --prompt='Q: {question}\\nA: ' --answer='{answer}'

Except with characters, the tokenizer's end-of-text token follows each document: each row, each part
of a text that a separator ends, or else each file.
"""

import codecs
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from console import print0, report_errors

import numpy as np
from tqdm import tqdm

import configurator
from engine.chat_layout import ChatLayout, document_start
from engine.errors import UserError
from engine.hf import tokenizer_json
from engine.prepare import text_files
from engine.prepare.conversations import RowSettings, choose_row_layout
from engine.prepare.dataset_writer import Piece, dataset_writer
from engine.prepare.documents import read_segments
from engine.prepare.encode import CountingEncoder, document_pieces, safe_pieces
from engine.prepare.held_out import FileContent, HeldOut, HeldOutFiles
from engine.prepare.kinds import CSV, TEXT, Source, find_sources
from engine.prepare.name_tokenizer import name_tokenizer
from engine.prepare.next_command import has_gpu, next_lines
from engine.prepare.row_layout import Segment
from engine.prepare.rows import DELIMITER_NAMES, find_delimiter, first_rows
from engine.tokenizer import (
    CHAR_END,
    MAX_VOCAB_SIZE,
    Tokenizer,
    add_characters,
    char_spec,
    code_points,
)

input = ''              # the file or folder to read: text, .jsonl, .ndjson, .json with a list,
                        # .csv, .tsv, .parquet, each also as .gz, or a .zip of them; hidden files in
                        # a folder are skipped
name = ''               # name of the dataset, a folder in data/; '' uses the input's name without
                        # its ending
tokenizer = 'gpt2'      # 'gpt2': byte pair encoding, 50,257 tokens; 'char': the characters of the
                        # text; 'bpe': byte pair encoding trained on this text; or a folder with a
                        # tokenizer, a dataset's such as data/notes, a run's such as out-notes, or
                        # a hub name such as HuggingFaceTB/SmolLM2-135M
add_tokens = ''         # new special tokens, such as <|user|>,<|bot|>; auto adds the characters
                        # that a vocabulary of characters lacks
special_tokens: Literal['auto', True, False] = 'auto'   # True: a special token that the text or a
                        # prompt spells, such as <|endoftext|>, becomes that token; False: it is
                        # ordinary text; auto: True, or what the dataset or run of `tokenizer` has
field = ''              # the column of rows that has the text; '' takes `text`, or else the only
                        # column with text
prompt = ''             # what comes before the answer in a row's document, such as
                        # 'Q: {question}\nA: ', in which {question} is a column; only the answer
                        # counts in the loss
answer = ''             # the answer, such as '{answer}'; '' without a prompt takes rows as their
                        # columns suggest: messages, question and answer, or a text
count_all = False       # True counts prompts in the loss too
separator = '<|endoftext|>'     # what ends a document within a text file: '\n' makes a document of
                        # each line, '' one of each file
encoding = ''           # how texts are encoded, such as cp1252; '' is UTF-8, or what the byte order
                        # mark of a file says
vocab_size = 4096       # how many tokens --tokenizer=bpe trains, at least 257
val_fraction = 0.1      # share that is held out as val.bin: of all documents, or of the end of
                        # each long text
val_input = ''          # a file or folder of its own that becomes val.bin; all of `input` is then
                        # trained on
token_files = ''        # in place of input, a folder with token files that exist already, such as
                        # shards of llm.c; its meta.json then names `tokenizer`
num_proc = 0            # how many cores encode, 0 for all; the result is the same

PLAIN = TEXT            # what is not worth a line
RUN_FILES = ('ckpt.pt', 'state.pt', 'state')    # a folder of a run has some of these
LONGEST_NAME = 200      # bytes; a file system takes 255, and endings such as .tmp are added


# Settings

def chosen_spec():
    """The spec of the tokenizer that a setting names; None if it comes from the text."""
    if tokenizer in ('char', 'bpe'):
        return None
    path = Path(tokenizer)
    if path.name in RUN_FILES or any((path / name).exists() for name in RUN_FILES):
        from engine.checkpoint import load_model, run_folder  # PyTorch takes seconds to import
        run = run_folder.find_run(tokenizer)
        if run:
            return load_model.run_spec(run)
    return tokenizer_json.named_spec(tokenizer, '--tokenizer=char, --tokenizer=bpe, ')


def check_add_tokens(spec):
    """Raise UserError where there is no vocabulary of characters to add some to."""
    if add_tokens != 'auto' or tokenizer == 'char' or (spec and spec.kind == 'char'):
        return
    raise UserError(f'add_tokens=auto adds characters to a vocabulary of characters, which '
                    f'{tokenizer} is not; name tokens, as in --add_tokens=NEW,OTHER, or none')


def with_characters(spec, chars, ends_documents):
    """The spec of characters, with all in `chars`, those of the text.

    ends_documents: the vocabulary has an end-of-text token as well.
    """
    needed = set(chars)
    if ends_documents and spec.end_of_text is None:
        needed.add(CHAR_END)

    lacking = sorted(needed - set(spec.chars))
    if lacking:
        first = ' '.join(map(repr, lacking[:10]))
        if add_tokens != 'auto':
            raise UserError(f'{tokenizer} lacks {len(lacking):,} characters of the text: {first}; '
                            f'--add_tokens=auto adds them')
        print0(f'characters that {tokenizer} lacks are added: {len(lacking):,}, {first}')
        spec = add_characters(spec, lacking)

    if ends_documents and spec.end_of_text is None:
        spec = replace(spec, end_of_text=spec.chars.index(CHAR_END))
    return spec


def with_special_tokens(spec):
    """The spec with the tokens of --add_tokens, and with what it makes of special tokens."""
    if add_tokens not in ('', 'auto'):
        names = [token.strip() for token in add_tokens.split(',')]
        spec = tokenizer_json.add_tokens(spec, names)
    if spec.kind == 'char':             # which has no special tokens
        return spec

    if special_tokens != 'auto':
        return replace(spec, special_tokens=special_tokens)
    if spec.special_tokens is None:
        return replace(spec, special_tokens=True)
    return spec


def check_settings():
    configurator.check_range(globals(), 'vocab_size', 257, MAX_VOCAB_SIZE)
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction={val_fraction} should be between 0 and 1; try '
                        f'--val_fraction=0.1')
    if not input:
        raise UserError('no text is named; type python data/text/prepare.py PATH, the path of a '
                        'file or of a folder of them')
    row_settings().check()
    check_encoding()


def check_encoding():
    """Raise UserError for an encoding that Python does not know."""
    if not encoding:
        return
    try:
        'a'.encode(encoding)            # 'hex' and others are no encodings of text
        codecs.getincrementaldecoder(encoding)
    except (LookupError, ValueError):
        raise UserError(f'encoding={encoding!r} is unknown; try --encoding=cp1252, gb18030, cp932 '
                        f'or another that Python knows') from None


def row_settings():
    """What the settings say of rows."""
    return RowSettings(field or None, prompt or None, answer or None, count_all)


def input_name():
    """The name of the input without its ending, of which .jsonl.gz is one."""
    path = text_files.input_path(input).resolve()
    return Path(path.name.removesuffix('.gz')).stem


def dataset_folder():
    """The folder to write to."""
    chosen = name or input_name()
    folder = FOLDER.parent / chosen
    if not chosen or chosen.startswith('.') or set(chosen) & set('\\/:\0'):
        raise UserError(f'name={chosen!r} should be a plain folder name, such as --name=mytext')
    if len(chosen.encode()) > LONGEST_NAME:
        raise UserError(f'a name of {len(chosen)} letters is too long for a folder, such as '
                        f'--name={chosen[:10]}')
    if (folder / 'prepare.py').exists() or folder.is_file():
        raise UserError(f'name={chosen!r} is taken by {folder}; try --name=my_{chosen}')
    return folder


def separator_text():
    """The text that ends a document, or None. A backslash and n are a newline, as in Python."""
    text = separator
    if special_tokens is False and text == tokenizer_json.END:      # it is ordinary text
        return None
    for typed, meant in (('\\n', '\n'), ('\\r', '\r'), ('\\t', '\t')):
        text = text.replace(typed, meant)
    if not text:
        return None
    return text


# Reading: once to count, and once more to encode

def choose_layout(source):
    """The RowLayout of a file with rows; None for a text and for a file without rows.

    This is the place that decides how rows become documents.
    """
    if source.kind == TEXT:
        if answer:
            raise UserError(f'--answer={answer!r} makes documents of rows, and {source} is a text; '
                            f'leave it out, or save rows as .jsonl or .csv')
        return None
    rows = first_rows(source)
    if not rows:
        return None
    return choose_row_layout(str(source), rows, row_settings())


class Input:
    """The files that are read, and what was found in them."""

    def __init__(self, sources: list[Source], is_char: bool):
        self.sources = sources
        self.is_char = is_char          # the tokens are characters
        self.layouts = [choose_layout(source) for source in sources]
        self.files: list[FileContent] = []
        self.chars = set()              # with is_char, all characters of the text
        self.tell_kinds()

    @property
    def has_masks(self) -> bool:
        """Some segments do not count in the loss."""
        return any(layout.has_masks for layout in self.layouts if layout)

    @property
    def in_segments(self) -> bool:
        """Each segment is encoded by itself."""
        return any(layout.in_segments for layout in self.layouts if layout)

    @property
    def chat(self) -> ChatLayout | None:
        """The layout of the conversations in the files, or None."""
        for layout in self.layouts:
            if layout and layout.chat:
                return layout.chat
        return None

    def check_chats(self):
        """Raise UserError for a file that has no conversations."""
        for source, layout in zip(self.sources, self.layouts):
            if layout is None or layout.chat is None:
                raise UserError(f'{source} has no conversations, which are rows with messages, or '
                                f'with a question and an answer; data/text/prepare.py '
                                f'--input={input} reads other files')

    def tell_kinds(self):
        """Say what the files were taken for, a line for each kind, except plain UTF-8 text."""
        kinds = Counter()
        examples = {}
        for source, layout in zip(self.sources, self.layouts):
            what = describe_source(source, layout)
            kinds[what] += 1
            examples.setdefault(what, source)

        for what, count in kinds.items():
            if what != PLAIN:
                name = str(examples[what]) if count == 1 else f'{count:,} files'
                print0(f'{name}: read as {what}')

    def read(self, source, layout):
        """The documents of a file, of which each is read before the next one."""
        if source.kind != TEXT and layout is None:
            return []                   # no rows
        documents = read_segments(source, layout, separator_text(), self.is_char)
        if layout and self.is_char and not self.in_segments:
            return map(end_with_newline, documents)
        return documents

    def read_all(self):
        """The documents of each file."""
        for source, layout in zip(self.sources, self.layouts):
            yield self.read(source, layout)

    def count(self):
        """Read all files, and count what is in them."""
        seen = np.zeros(0x110000, bool)         # which code points occur
        bar = tqdm(desc='reading', unit=' characters', unit_scale=True, delay=1, disable=None)
        with bar:
            for documents, layout in zip(self.read_all(), self.layouts):
                content = FileContent(layout)
                for segments in documents:
                    if segments == []:
                        content.empty += 1
                        continue
                    content.documents += 1
                    for text, _ in segments:
                        content.characters += len(text)
                        if self.is_char:
                            seen[code_points(text)] = True
                        bar.update(len(text))
                if not content.documents:       # an empty file
                    content.empty = max(1, content.empty)
                self.files.append(content)
        self.chars = {chr(code) for code in np.flatnonzero(seen)}

    def all_chars(self):
        """The characters of the text, and those that prompts of a model need."""
        needed = ''
        if self.in_segments:
            needed += '\n'              # what samples begin with by default
        if self.chat:
            needed += ''.join(self.chat.to_dict().values())
        return self.chars | set(needed)

    def tell_separators(self):
        """Say how many documents the separator makes of texts, if any."""
        separated = [file for file in self.files if not file.layout and file.documents > 1]
        if separated:
            found = sum(file.documents for file in separated)
            print0(f'the text is divided at {separator_text()!r} into {found:,} documents; '
                   f'--separator= (nothing) leaves it whole')


def describe_source(source, layout):
    """What a file was taken for, for a line that is printed."""
    what = source.kind
    if source.kind == CSV:
        what = f'a table with {DELIMITER_NAMES[find_delimiter(source)]} between its fields'
    if source.encoding != 'utf-8':
        what += f' in {source.encoding}'
    if layout:
        what += f'; {layout.description}'
    return what


def end_with_newline(segments):
    """A document of a row, which a newline follows: characters have no end-of-text token."""
    if segments == [] or segments[-1].text.endswith('\n'):
        return segments
    return [*segments, Segment('\n', segments[-1].counts)]


def read_pieces(documents, encoder, in_segments):
    """The Pieces of all SplitDocuments.

    encode() adds the end of a document: to a text that is one, or for an empty text. Where segments
    are encoded one by one, the writer adds it, and encode() adds the beginning for an empty text.
    """
    for split, segments in documents:
        if in_segments:
            yield from segment_pieces(split, segments, encoder)
        elif encoder.chars:
            for text, _ in segments:
                yield Piece(split, text, False)
        elif encoder.splits_like_gpt2:
            for text, _ in safe_pieces(segment.text for segment in segments):
                if text:
                    yield Piece(split, text, False)
            yield Piece(split, '', False)
        else:
            yield Piece(split, ''.join(segment.text for segment in segments), False)


def segment_pieces(split, segments, encoder):
    """The Pieces of a document whose segments are encoded one by one.

    The end-of-text token counts where the last segment does. Few tokenizers have none.
    """
    last = Piece(split, '', False, False)       # the beginning, which encode() makes of ''
    for text, counts in segments:
        for piece, _ in document_pieces([text], encoder):
            if piece:
                yield last
                last = Piece(split, piece, False, counts)
    yield last._replace(ends_document=encoder.end_of_text is not None)


def train_tokenizer(documents, total):
    """The spec of a byte-level BPE tokenizer, trained on the text of train.bin: about `total`
    characters of SplitDocuments."""
    bar = tqdm(desc='training the tokenizer', total=total, unit=' characters', unit_scale=True,
               delay=1, disable=None)

    def train_texts():
        for split, segments in documents:
            if split == 'train':
                for text, _ in safe_pieces(segment.text for segment in segments):
                    yield text
                    bar.update(len(text))

    with bar:
        spec = tokenizer_json.train_bpe(train_texts(), vocab_size)
    if spec.vocab_size < vocab_size:
        print0(f'note: the text has pairs for {spec.vocab_size:,} tokens, not for '
               f'{vocab_size:,}')
    return spec


def name_tokenizer_of_files():
    """Write the meta.json of token files that exist already."""
    if input:
        raise UserError('input and token_files are both named; name one')
    if tokenizer in ('char', 'bpe') or add_tokens:
        raise UserError('token_files has ids already, so --tokenizer= should name the tokenizer '
                        'that made them: gpt2, a folder or a hub name, without add_tokens')
    folder = Path(token_files).expanduser().resolve()
    meta = name_tokenizer(folder, chosen_spec())
    counts = ', '.join(f'{split} has {count:,}' for split, count in meta.tokens.items())
    print0(f'{folder / "meta.json"}: {meta.dtype} ids of {meta.spec.label}; {counts} tokens')

    dataset = str(folder)
    if folder.parent == FOLDER.parent:
        dataset = folder.name
    for line in next_lines(dataset, meta.tokens, meta.spec.kind == 'char', has_gpu()):
        print0(line)


def main():
    if token_files:
        name_tokenizer_of_files()
        return
    check_settings()
    folder = dataset_folder()
    written = write_dataset(folder)
    for line in next_lines(folder.name, written.tokens, written.is_char, has_gpu(),
                           written.has_answers):
        print0(line)


class Written(NamedTuple):
    """What was written: how many tokens each split has, and what the next command depends on."""
    tokens: dict[str, int]
    is_char: bool               # the tokens are characters
    has_answers: bool           # only answers count in the loss, and a token ends each document


def write_dataset(folder: Path, only_chats: bool = False) -> Written:
    """Write a dataset from `input` to a folder.

    only_chats: anything but conversations is refused.
    """
    spec = chosen_spec()            # a name that leads nowhere fails before the text is read
    is_char = tokenizer == 'char' or (spec is not None and spec.kind == 'char')
    check_add_tokens(spec)

    # read and count
    inputs = [input]
    if val_input:
        inputs.append(val_input)
    files = [file for path in inputs for file in text_files.find_files(path)]
    before = text_files.fingerprint(files)
    sources = [find_sources(path, encoding or None) for path in inputs]
    texts = Input([source for found in sources for source in found], is_char)
    if only_chats:
        texts.check_chats()
    texts.count()
    texts.tell_separators()
    total = sum(file.characters for file in texts.files)
    if val_input:
        held_out = HeldOutFiles(len(sources[0]), texts.files)
    else:
        held_out = HeldOut(val_fraction, texts.files)
    check_split(held_out, total)

    # the tokenizer
    if tokenizer == 'bpe':
        spec = train_tokenizer(held_out.split(texts.read_all()), total)
    elif tokenizer == 'char':
        spec = char_spec(texts.all_chars(), ends_documents=texts.in_segments)
    elif is_char:
        spec = with_characters(spec, texts.all_chars(), ends_documents=texts.in_segments)
    encoder = Tokenizer(with_special_tokens(spec))
    counting = CountingEncoder(encoder)

    def encode(text):
        if texts.in_segments:
            if not text:
                return np.array(document_start(encoder), encoder.dtype)
            return counting.encode(text)
        is_end = not text or not encoder.splits_like_gpt2
        return counting.encode(text, as_document=is_end)

    # encode and write
    with dataset_writer(folder, encoder.spec, has_masks=texts.has_masks,
                        chat=texts.chat) as writer:
        pieces = read_pieces(held_out.split(texts.read_all()), encoder, texts.in_segments)
        writer.write(pieces, encode, total, cores=num_proc)
        counting.finish()
        if text_files.fingerprint(files) != before:
            raise UserError(f'{input} changed while it was read; run again when nothing writes to '
                            f'it')
    tell_the_end(texts, held_out)

    has_answers = texts.has_masks and encoder.end_of_text is not None
    return Written(writer.tokens, is_char, has_answers)


def check_split(held_out, total):
    """Raise UserError where train or val would be empty."""
    if held_out.has_both_splits:
        return
    if val_input:
        raise UserError(f'{input} and {val_input} should both have some text')
    if held_out.documents == 1 and not held_out.ends:
        raise UserError(f'{input} has a single document, and train and val need one each; --input= '
                        f'takes more')
    cut = int(total * held_out.train_share)
    raise UserError(f'{input} has {total:,} characters, and val_fraction={val_fraction} leaves '
                    f'{cut:,} to train on; --input= takes more text')


def tell_the_end(texts, held_out):
    """Say what was read, and what val holds."""
    documents = sum(file.documents for file in texts.files)
    empty = sum(file.empty for file in texts.files)
    total = sum(file.characters for file in texts.files)
    left_out = ''
    if empty:
        left_out = f', without {empty:,} that are empty'
    print0(f'files: {len(texts.files):,}; documents: {documents:,}{left_out}; '
           f'characters: {total:,}')
    print0(f'val.bin holds {held_out.describe()}')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:], path_setting='input')
        main()
