"""The page in a real browser, where one is installed."""

import pytest
from webdriver import ENTER, Browser, find_programs

pytestmark = pytest.mark.skipif(
    None in find_programs(), reason='chromium or chromedriver is not installed; the variables '
                                    'CHROMIUM and CHROMEDRIVER may name them')

TURNS = "return [...document.querySelectorAll('.turn')].map(e => e.textContent)"
LAST = "document.querySelector('.assistant:last-child')"
IS_DONE = "return !document.getElementById('send').hidden"
SETTING = "document.querySelector('[name=max_new_tokens]')"


@pytest.fixture(scope='module')
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def page(browser, server):
    """The browser with a new conversation."""
    browser.open(f'http://127.0.0.1:{server.server_port}/')
    browser.run('sessionStorage.clear()')
    browser.reload()
    browser.wait(f'return {SETTING}')
    yield browser
    assert browser.errors() == []


def set_tokens(page, number):
    page.run(f"{SETTING}.value = {number}; {SETTING}.dispatchEvent(new Event('input'))")


def test_a_person_types_and_the_answer_streams(page):
    assert page.run('return document.title') == 'toy'
    set_tokens(page, 3000)
    page.type('#text', 'Hello' + ENTER)
    lengths = []
    for _ in range(3):
        length = lengths[-1] if lengths else 0
        lengths.append(page.wait(f'const n = {LAST}.textContent.length; return n > {length} && n'))
    assert lengths == sorted(set(lengths)) and not page.run(IS_DONE)
    page.click('#stop')
    page.wait(IS_DONE)
    assert page.run(TURNS)[0] == 'Hello'


def test_stop_keeps_what_was_written_and_retry_answers_again(page, server):
    set_tokens(page, 60000)
    page.type('#text', 'Hello' + ENTER)
    page.wait(f'return {LAST}.textContent.length > 20')
    page.click('#stop')
    page.wait(IS_DONE)
    question, first = page.run(TURNS)
    assert 20 < len(first) < 30000

    set_tokens(page, 20)
    page.click('#retry')
    page.wait(IS_DONE)
    question, second = page.run(TURNS)
    assert question == 'Hello' and len(second) == 20 and not first.startswith(second)
    assert page.run('return document.activeElement !== null')


def test_a_reload_keeps_the_conversation_and_new_begins_another(page):
    page.type('#text', 'One' + ENTER)
    page.wait(f'return {LAST}.textContent.length == 20')
    page.wait(IS_DONE)
    page.type('#text', 'Two' + ENTER)
    page.wait("return document.querySelectorAll('.turn').length == 4")
    page.wait(IS_DONE)
    before = page.run(TURNS)
    page.reload()
    assert page.run(TURNS) == before and before[2] == 'Two'
    page.click('#new')
    assert page.run(TURNS) == []
    page.reload()
    assert page.run(TURNS) == []


def test_two_tabs_stream_at_once_and_stay_apart(page, server):
    set_tokens(page, 60000)
    page.type('#text', 'First' + ENTER)
    page.wait(f'return {LAST}.textContent.length > 5')
    first = page.new_tab()
    page.open(f'http://127.0.0.1:{server.server_port}/')
    page.wait(f'return {SETTING}')
    assert page.run(TURNS) == []
    set_tokens(page, 60000)
    page.type('#text', 'Second' + ENTER)
    page.wait(f'return {LAST}.textContent.length > 5')

    # both go on
    second = page.call('GET', '/window')
    for tab in (first, second, first, second):
        page.go_to(tab)
        length = page.run(f'return {LAST}.textContent.length')
        page.wait(f'return {LAST}.textContent.length > {length}')
    for tab, text in ((second, 'Second'), (first, 'First')):
        page.go_to(tab)
        page.click('#stop')
        page.wait(IS_DONE)
        turns = page.run(TURNS)
        assert turns[0] == text and len(turns) == 2
    page.go_to(second)
    page.call('DELETE', '/window')
    page.go_to(first)


def test_a_message_is_text_and_never_a_part_of_the_page(page):
    text = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>&amp;'
    page.type('#text', text + ENTER)
    page.wait(f'return {LAST}.textContent.length == 20')
    page.wait(IS_DONE)
    assert page.run(TURNS)[0] == text
    assert page.run("return document.querySelectorAll('main img, main script').length") == 0
    assert page.run('return window.hit') is None


def test_what_the_model_cannot_read_returns_to_where_it_was_typed(page):
    page.type('#text', 'snow ☃' + ENTER)
    note = page.wait("return document.getElementById('note').textContent")
    assert "'☃' is not in the vocabulary" in note
    assert page.run("return document.getElementById('text').value") == 'snow ☃'
    assert page.run(TURNS) == []
    browser_lines = page.errors()                   # the browser itself tells of the status 400
    assert len(browser_lines) == 1 and '400' in browser_lines[0]


def test_a_retry_that_fails_keeps_the_answer_before_it(page):
    page.type('#text', 'Hello' + ENTER)
    page.wait(f'return {LAST}.textContent.length == 20')
    page.wait(IS_DONE)
    before = page.run(TURNS)
    set_tokens(page, 0)                             # the server refuses this
    page.type('#text', 'typed meanwhile')
    page.click('#retry')
    page.wait("return document.getElementById('note').className == 'error'")
    page.wait(IS_DONE)
    assert page.run(TURNS) == before
    assert page.run("return document.getElementById('text').value") == 'typed meanwhile'
    page.reload()
    assert page.run(TURNS) == before
    assert len(page.errors()) == 1                  # the browser itself tells of the status 400


def test_a_conversation_that_is_cut_begins_with_a_question(page):
    """MOST is 80,000 characters."""
    roles = page.run("""
        turns = [];
        for (let i = 0; i < 4; i++)
            turns.push({role: 'user', content: 'x'.repeat(30000)},
                       {role: 'assistant', content: 'y'});
        turns.push({role: 'user', content: 'x'});
        return latestTurns().map(turn => turn.role)""")
    assert roles == ['user', 'assistant', 'user', 'assistant', 'user']
