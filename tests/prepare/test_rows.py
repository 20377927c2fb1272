"""Files as people have them: what they are, their rows, their encodings."""

import csv
import gzip
import io
import json
import subprocess
import sys
import zipfile

import pytest

from engine.errors import UserError
from engine.prepare import rows, text_files
from engine.prepare.documents import read_segments, split_at_separator
from engine.prepare.kinds import CSV, JSON, JSON_LINES, PARQUET, TEXT, find_sources
from engine.prepare.row_layout import text_layout
from engine.prepare.rows import find_delimiter, read_rows
from engine.prepare.text_encoding import guess_encoding

RECORDS = [
    dict(id='0', text='plain'),
    dict(id='1', text='a "quoted", word;\nand a line\r\nof Windows\ttab | bar'),
    dict(id='2', text='naïve 你好 \U0001F468\u200d\U0001F469\u200d\U0001F467'),
    dict(id='3', text=''),
] * 20


def as_csv(delimiter, ending='\r\n'):
    file = io.StringIO()
    writer = csv.DictWriter(file, ['id', 'text'], delimiter=delimiter, lineterminator=ending)
    writer.writeheader()
    writer.writerows(RECORDS)
    return file.getvalue().encode()


def as_parquet():
    pa = pytest.importorskip('pyarrow')
    pq = pytest.importorskip('pyarrow.parquet')
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS), file, row_group_size=9)
    return file.getvalue()


LINES = ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in RECORDS).encode()
MARK = b'\xef\xbb\xbf'
FILES = {
    'a.jsonl': (JSON_LINES, LINES),
    'mark.jsonl': (JSON_LINES, MARK + LINES),
    'a.ndjson': (JSON_LINES, LINES.replace(b'\n', b'\r\n')),
    'wide.jsonl': (JSON_LINES, LINES.decode().encode('utf-16')),
    'lines.json': (JSON_LINES, LINES),
    'lines.txt': (JSON_LINES, LINES),
    'list.json': (JSON, json.dumps(RECORDS, indent=1).encode()),
    'one_line.json': (JSON, MARK + json.dumps(RECORDS).encode()),
    'list.jsonl': (JSON, json.dumps(RECORDS).encode()),
    'a.csv': (CSV, as_csv(',')),
    'mark.csv': (CSV, MARK + as_csv(',', '\n')),
    'semicolons.csv': (CSV, as_csv(';')),
    'bars.csv': (CSV, as_csv('|')),
    'tabs.csv': (CSV, as_csv('\t')),
    'a.tsv': (CSV, as_csv('\t')),
}


def packed(name, content):
    """(name, content) of a file with the content, and of a .gz and a .zip of it."""
    yield name, content
    yield f'{name}.gz', gzip.compress(content)
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f'folder/{name}', content)
    yield f'{name}.zip', file.getvalue()


@pytest.mark.parametrize('block', [7, 1 << 18])
@pytest.mark.parametrize('name', [*FILES, 'a.parquet'])
def test_every_kind_of_file_has_the_same_rows(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(text_files, 'BLOCK', block)
    kind, content = FILES.get(name) or (PARQUET, as_parquet())
    for path, data in packed(name, content):
        (tmp_path / path).write_bytes(data)
        source, = find_sources(tmp_path / path)
        assert source.kind == kind
        assert [row.values for row in read_rows(source)] == RECORDS


@pytest.mark.parametrize('name, text, kind', [
    ('a.txt', 'a text {"with": 1}\nof two lines', TEXT),
    ('a.txt', '{"one": "object"}', TEXT),
    ('a.txt', '[a list]\n[of links]', TEXT),
    ('a.txt', '[{"text": "one"}, {"text": "two"}]', JSON),
    ('notes', '{"text": "one"}\n{"text": "two"}\n', JSON_LINES),
    ('a.py', 'x = {}\n', TEXT),
    ('a.json', '{\n "text": "one object"\n}', JSON),
])
def test_a_kind_is_told_by_name_and_content(tmp_path, name, text, kind):
    (tmp_path / name).write_text(text)
    source, = find_sources(tmp_path / name)
    assert source.kind == kind


@pytest.mark.parametrize('content, words', [
    (b'%PDF-1.4\n%\xe2\xe3', 'is a PDF; pdftotext makes text of it'),
    (b'\x89PNG\r\n\x1a\n\0', 'is an image'),
    (b'RIFF\0\0\0\0WEBPVP8', 'is an image'),
    (b'\xd0\xcf\x11\xe0\0', 'Microsoft Office'),
    (b'\0' * 257 + b'ustar\0', 'is a tar archive; unpack it'),
    (b'ab\0cd', 'is binary: byte 2 is NUL'),
    ('wide text\n'.encode('utf-16-be'), 'add --encoding=utf-16-be'),
    (b'PK\x03\x04 and no more', 'is a damaged zip'),
    (gzip.compress(b'text' * 1000, mtime=0)[:-20], 'is damaged'),
])
def test_what_holds_no_text_is_refused_by_what_it_is(tmp_path, content, words):
    (tmp_path / 'a.txt').write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        for source in find_sources(tmp_path / 'a.txt'):
            list(text_files.read_source(source))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('member, what', [
    ('word/document.xml', 'a Word document'), ('xl/workbook.xml', 'an Excel table'),
    ('META-INF/container.xml', 'an EPUB book')])
def test_documents_that_are_zips_are_named(tmp_path, member, what):
    with zipfile.ZipFile(tmp_path / 'a.bin', 'w') as archive:
        archive.writestr(member, '<text/>')
    with pytest.raises(UserError, match=what):
        find_sources(tmp_path / 'a.bin')


def test_a_zip_within_a_zip_is_refused_and_hidden_files_are_left_out(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, 'w') as archive:
        archive.writestr('a.txt', 'text')
    with zipfile.ZipFile(tmp_path / 'outer.zip', 'w') as archive:
        archive.writestr('b.txt', 'text')
        archive.writestr('__MACOSX/._b.txt', b'\0')
        archive.writestr('.hidden', 'no')
    assert [source.member for source in find_sources(tmp_path / 'outer.zip')] == ['b.txt']

    with zipfile.ZipFile(tmp_path / 'outer.zip', 'a') as archive:
        archive.writestr('inner.zip', inner.getvalue())
    with pytest.raises(UserError, match='inner.zip is a zip within a zip; unpack it'):
        find_sources(tmp_path / 'outer.zip')


def test_binaries_in_a_folder_are_left_out_with_a_count(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text('text')
    (tmp_path / 'cover.png').write_bytes(b'\x89PNG\r\n')
    (tmp_path / 'Thumbs.db').write_bytes(b'\xd0\xcf\x11\xe0\0')
    assert [source.path.name for source in find_sources(tmp_path)] == ['a.txt']
    assert 'leaving out 2 files that hold no text' in capsys.readouterr().out


# rows that cannot be read

@pytest.mark.parametrize('name, text, words', [
    ('a.jsonl', '{"text": "a"}\n{"text": a}\n', 'line 2 is not JSON'),
    ('a.jsonl', '{"text": "a"}\n["text"]\n', 'line 2 has no string'),
    ('a.json', '[{"text": "a"}, {"text": oops, "more": "and more text"}]', 'row 2 is not JSON'),
    ('a.json', '[{"text": "a"}, {"text": "b"}', 'ends within its list, after row 2'),
    ('a.json', '[{"text": "a"}, 7]', 'row 2 has no string'),
    ('a.csv', 'id,text\n1,a\n2,b,c\n', 'row 2 after the names of the columns .* 3 fields'),
    ('a.csv', 'id,text\n1,a\n2,"b\n3,c\n4,d\n', 'row 2 .* a field in quotes does not end'),
    ('a.csv', 'text\n' + 'a' * 300 + '\n', 'longer than 200 bytes'),
    ('a.jsonl', '{"text": "' + 'a' * 300 + '"}\n', 'longer than 200 bytes'),
    ('a.json', '[{"text": "' + 'a' * 300 + '"}]', 'longer than 200 bytes'),
])
def test_a_row_that_cannot_be_read_is_named(tmp_path, monkeypatch, name, text, words):
    monkeypatch.setattr(rows, 'MAX_ROW', 200)
    monkeypatch.setattr(text_files, 'BLOCK', 16)
    (tmp_path / name).write_text(text)
    source, = find_sources(tmp_path / name)
    with pytest.raises(UserError, match=words) as error:
        list(read_rows(source))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text, delimiter', [
    ('text\nOne, two; three\nfour\n', ','), ('a;b\n1,5;2,5\n3,5;4,5\n', ';'),
    ('a\tb\n1\t2\n', '\t'), ('a,b\n1,5" pipe\n', ','),
    ('text\n"one\nrow, in; quotes"\n', ','), ('', ',')])
def test_the_delimiter_is_the_one_that_all_rows_agree_on(tmp_path, text, delimiter):
    (tmp_path / 'a.csv').write_text(text)
    source, = find_sources(tmp_path / 'a.csv')
    assert find_delimiter(source) == delimiter


@pytest.mark.parametrize('delimiter, is_read', [('\t', True), (',', False)])
def test_a_quote_that_is_a_letter_joins_no_rows(tmp_path, delimiter, is_read):
    """Tables with tabs often have such; in others it is refused."""
    texts = ['"Stop! he said', '"Go" they said', 'and "went', '"']
    lines = [f'{number}{delimiter}{text}\n' for number, text in enumerate(texts)]
    (tmp_path / 'a.csv').write_text(f'id{delimiter}text\n' + ''.join(lines))
    source, = find_sources(tmp_path / 'a.csv')
    if is_read:
        assert [row.values['text'] for row in read_rows(source)] == texts
    else:
        with pytest.raises(UserError, match='row 1 after the names .* expected after'):
            list(read_rows(source))


# the column

@pytest.mark.parametrize('row, column', [
    (dict(title='a', text='b'), 'text'), (dict(id=7, content='b'), 'content'),
    (dict(id='7', content='b'), 'content'), (dict(id='x1', body='b', label=None), None)])
def test_the_column_is_text_or_the_only_one_with_text(row, column):
    first_is_null = [dict.fromkeys(row), row]
    if column is None:
        with pytest.raises(UserError, match=r"only id \('x1'\), body \('b'\), label \(None\)"):
            text_layout('a.jsonl', first_is_null)
        return
    layout = text_layout('a.jsonl', first_is_null)
    assert layout.make(row) == [(row[column], True)] and layout.make(dict.fromkeys(row)) == []


def test_a_named_column_must_exist_and_hold_text():
    table = [dict(id=7, content='b')]
    with pytest.raises(UserError, match='no column `body`, only id'):
        text_layout('a.jsonl', table, 'body')
    with pytest.raises(UserError, match='column id of a.jsonl holds no text, but 7'):
        text_layout('a.jsonl', table, 'id')
    with pytest.raises(UserError, match='column text of a.jsonl holds no text, but 7'):
        text_layout('a.jsonl', [dict(text=None), dict(text=7)])
    with pytest.raises(ValueError, match='no string under `content`: 7'):
        text_layout('a.jsonl', table).make(dict(content=7))


def test_no_column_is_suggested_where_none_holds_text():
    with pytest.raises(UserError, match=r'no column of text, only id \(7\), ids \(\[1, 2\]\)'):
        text_layout('a.jsonl', [dict(id=7, ids=[1, 2])])
    with pytest.raises(UserError, match='as in --field=code'):     # a number within a table is text
        text_layout('a.csv', [dict(id=7, code='12')])


@pytest.mark.parametrize('wanted, suggested', [('text', 'content'), ('Body', 'body')])
def test_the_suggested_column_has_text_and_may_differ_in_case(wanted, suggested):
    table = [dict(id=7, content='b', body='c')]
    with pytest.raises(UserError, match=f'--field={suggested}$'):
        text_layout('a.jsonl', table, wanted)
    text_layout('a.jsonl', table, suggested)


def test_an_object_around_the_rows_is_told_with_a_command_that_takes_them_out(tmp_path):
    wrapped = dict(version='1.1', data=[dict(text='a'), dict(text='b')])
    with pytest.raises(UserError, match="is one object, and its rows .* under 'data'") as refused:
        text_layout('a.json', [wrapped])

    program = str(refused.value).split('python -c "')[1].split('" < OLD > NEW.json')[0]
    done = subprocess.run([sys.executable, '-c', program], input=json.dumps(wrapped), text=True,
                          capture_output=True, check=True)
    assert json.loads(done.stdout) == wrapped['data']


def test_a_table_without_names_is_refused_and_the_advice_reads_it(tmp_path):
    stories = ['A long story. ' * 30, 'Another story. ' * 30]
    table = ''.join(f'{number},"{story}"\n' for number, story in enumerate(stories))
    path = tmp_path / 'a.csv'
    path.write_text(table)
    source, = find_sources(path)
    with pytest.raises(UserError, match='first row .* should name the columns') as refused:
        list(read_rows(source))

    names = str(refused.value).split('such as ')[1]
    path.write_text(f'{names}\n{table}')
    assert [row.values['text'] for row in read_rows(source)] == stories


# separators

@pytest.mark.parametrize('separator', ['<|endoftext|>', '\n', '\n\n', 'aa'])
@pytest.mark.parametrize('step', [1, 2, 5, 1000])
def test_a_text_is_divided_as_split_does_wherever_its_pieces_end(separator, step):
    text = 'one<|endoftext|>two aaa\n\n\nthree\n<|endoftext|><|endoftext|>four<|endoftext'
    texts = [text[i:i + step] for i in range(0, len(text), step)]
    for keep, ending in ((False, ''), (True, separator)):
        documents = {}
        for number, part in split_at_separator(texts, separator, keep):
            documents[number] = documents.get(number, '') + part
        expected = text.split(separator)
        expected = [part + ending for part in expected[:-1]] + [expected[-1]]
        assert [documents.get(i, '') for i in range(len(expected))] == expected


def test_a_line_of_windows_is_a_document_too(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'one\r\ntwo\r\n\r\nthree')
    source, = find_sources(tmp_path / 'a.txt')
    documents = read_segments(source, None, '\n', keep_separator=False)
    texts = [''.join(segment.text for segment in document) for document in documents]
    assert texts == ['one', 'two', '', 'three']


# encodings

@pytest.mark.parametrize('encoding, text', [
    ('cp1252', 'It’s “an old” café — naïve…'),
    ('cp1252', 'Über die Straße führt für Müller ein schöner Weg'),
    ('cp1250', 'Zażółć gęślą jaźń, książę'),
    ('cp1251', 'Широкая электрификация южных губерний даст мощный толчок'),
    ('koi8-r', 'Широкая электрификация южных губерний даст мощный толчок'),
    ('gb18030', '我们在这里看到了一个新的世界，它很大。'),
    ('big5', '我們在這裡看到了一個新的世界，它很大。'),
    ('shift_jis', '吾輩は猫である。名前はまだ無い。'),
    ('euc-jp', '吾輩は猫である。名前はまだ無い。'),
    ('euc-kr', '나는 오늘 학교에 가서 친구를 만났다. 그리고 집으로 돌아왔다.'),
])
@pytest.mark.parametrize('block', [1 << 18, 64])
def test_the_refusal_names_the_encoding_and_the_advice_reads_the_text(tmp_path, monkeypatch,
                                                                      encoding, text, block):
    monkeypatch.setattr(text_files, 'BLOCK', block)
    text = f'Some English first.\n{text}\n' * 30
    data = text.encode(encoding)
    assert guess_encoding(data) == encoding
    (tmp_path / 'a.txt').write_bytes(data)
    source, = find_sources(tmp_path / 'a.txt')
    with pytest.raises(UserError, match=f'add --encoding={encoding}'):
        list(text_files.read_source(source))
    source, = find_sources(tmp_path / 'a.txt', encoding)
    assert ''.join(text_files.read_source(source)) == text


def test_noise_has_no_encoding():
    assert guess_encoding(bytes(range(128, 256)) * 20) is None


@pytest.mark.parametrize('block', [1, 3, 1 << 18])
@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-32'])
def test_a_byte_order_mark_decides_and_is_dropped(tmp_path, monkeypatch, encoding, block):
    monkeypatch.setattr(text_files, 'BLOCK', block)
    text = 'naïve 你好 🙂\n' * 9
    (tmp_path / 'a.txt').write_bytes(text.encode(encoding))
    source, = find_sources(tmp_path / 'a.txt')
    assert ''.join(text_files.read_source(source)) == text
    assert ''.join(text_files.read_text(tmp_path / 'a.txt')) == text


@pytest.mark.parametrize('encoding, without_mark', [
    ('utf-16', 'utf-16-le'), ('UTF16', 'utf-16-be'), ('utf-32', 'utf-32-le')])
def test_an_encoding_that_needs_a_mark_names_one_that_does_not(tmp_path, encoding, without_mark):
    path = tmp_path / 'a.txt'
    path.write_bytes(('Fourscore and seven years ago\n' * 9).encode(without_mark))
    with pytest.raises(UserError, match='has no byte order mark') as refused:
        find_sources(path, encoding)
    advice = str(refused.value).split('--encoding=')[1]
    source, = find_sources(path, advice)
    assert ''.join(text_files.read_source(source)).startswith('Fourscore and seven')


def test_a_text_in_utf8_that_is_read_as_something_else_is_told(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text('café', encoding='utf-8')
    (tmp_path / 'b.txt').write_bytes('café au lait'.encode('cp1252'))
    assert [source.encoding for source in find_sources(tmp_path, 'cp1252')] == ['cp1252'] * 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and 'a.txt is valid UTF-8, and is read as cp1252' in lines[0]
