"""Questions and their answers, made by rules: sums, sorting, spelling, days and months, small talk.

Questions that ask for the same thing have the same key, by which they are held out: a sum in all
wordings and in both orders, the letters of a word, a name. Nobody can work out the answers of small
talk and of the calendar. There the key is the wording, and other wordings teach the answer.
"""

import hashlib
from collections.abc import Callable
from random import Random
from typing import NamedTuple


class Question(NamedTuple):
    """What a user says, and the one right answer."""
    kind: str
    key: str                # what is held out together
    text: str
    answer: str


def is_held_out(key: str, share: float, seed: int) -> bool:
    """True for `share` of all keys, chosen by a hash of the seed and the key."""
    digest = hashlib.sha256(f'{seed}, {key}'.encode()).digest()
    return int.from_bytes(digest[:8], 'big') < share * 2 ** 64


def plain(text: str) -> str:
    """The text in small letters, without the mark at its end: what all variants have in common."""
    return text.lower().rstrip('?.! ')


# Sums

SUMS = (
    'What is {a} plus {b}?',
    'What is {a} + {b}?',
    'How much is {a} plus {b}?',
    'How much is {a} + {b}?',
    'Add {a} and {b}.',
    'Can you add {a} and {b}?',
    'What is the sum of {a} and {b}?',
    '{a} + {b} = ?',
    '{a} + {b}',
    '{a} plus {b}?',
)
LARGEST_SUM = 50


def ask_sum(random: Random) -> Question:
    total = random.randint(0, LARGEST_SUM)
    a = random.randint(0, total)
    b = total - a
    text = random.choice(SUMS).format(a=a, b=b)
    return Question('sum', f'sum {min(a, b)} {max(a, b)}', text, f'{a} plus {b} is {total}.')


# Sorting

SORTED_LETTERS = (
    'Sort the letters {items}.',
    'Sort these letters: {items}',
    'Put the letters {items} in order.',
    'Please sort the letters {items}.',
    'What is the alphabetical order of {items}?',
    'Can you sort the letters {items}?',
)
SORTED_NUMBERS = (
    'Sort the numbers {items}.',
    'Sort these numbers: {items}',
    'Put the numbers {items} in order.',
    'Please sort the numbers {items}.',
    'What is the order of the numbers {items}?',
    'Can you sort the numbers {items}?',
)
LETTERS = 'abcdefghijklmnopqrstuvwxyz'
DIGITS = '0123456789'


def ask_to_sort(random: Random, kind: str, wordings: tuple[str, ...], symbols: str) -> Question:
    """A question about 3 to 5 different letters or digits."""
    items = random.sample(symbols, random.randint(3, 5))
    right = ', '.join(sorted(items))
    separator = random.choice((', ', ' '))
    text = random.choice(wordings).format(items=separator.join(items))
    return Question(kind, f'sort {right}', text, f'In order: {right}.')


def ask_to_sort_letters(random: Random) -> Question:
    return ask_to_sort(random, 'sort letters', SORTED_LETTERS, LETTERS)


def ask_to_sort_numbers(random: Random) -> Question:
    return ask_to_sort(random, 'sort numbers', SORTED_NUMBERS, DIGITS)


# Spelling

SPELLED = (
    'Spell {word}.',
    'Spell the word {word}.',
    'How do you spell {word}?',
    'How is {word} spelled?',
    'Can you spell {word}?',
    'Please spell {word}.',
)
SPELLED_BACKWARDS = (
    'Spell {word} backwards.',
    'Spell the word {word} backwards.',
    'How do you spell {word} backwards?',
    'What is {word} spelled backwards?',
    'Can you spell {word} backwards?',
    'Please spell {word} from its end.',
)
WORDS = '''
    apple arm baby back ball bank bear bed bee bell bird boat body bone book box boy bread brick
    bridge brush bus butter cake camel candle car card cat chair cheese cherry child city clock
    cloud coat coffee corn cow cup dance day desk dinner dog door dream dress drum duck ear earth
    egg engine eye face farm father field finger fire fish floor flower fly food foot forest fork
    fox friend frog fruit garden gate gift girl glass glove goat gold grape grass green hair hammer
    hand hat head heart hill home honey horse hotel house ice island jacket jam jar juice key king
    kite kitchen knee knife ladder lake lamp leaf leg lemon letter light lion lip lunch map market
    meal metal milk mirror money monkey moon morning mother mouse mouth music nail name neck nest
    net night north nose nut ocean oil onion orange oven owl page paint paper park pear pen pencil
    pepper piano pig pillow pilot plane plant plate pocket pony potato queen rabbit rain ring river
    road robot rock roof room root rope rose salt sand school sea seed sheep ship shirt shoe shop
    silver sister sky sleep smile snail snow soap sock song soup spoon spring star stone storm
    street sugar summer sun table tail tea teacher tent tiger tooth tower town train tree uncle
    valley violin voice wall watch water wave wheel wind window winter wolf wood wool yard zebra
    '''.split()
CONSONANTS = 'bcdfghjklmnprstvwz'
VOWELS = 'aeiou'
SHARE_OF_REAL_WORDS = 0.4


def choose_word(random: Random) -> str:
    """A word of the list, or one of syllables, so that no list can be learned by heart."""
    if random.random() < SHARE_OF_REAL_WORDS:
        return random.choice(WORDS)
    word = ''.join(random.choice(CONSONANTS) + random.choice(VOWELS)
                   for _ in range(random.randint(1, 3)))
    return word + random.choice(CONSONANTS)


def ask_to_spell(random: Random) -> Question:
    word = choose_word(random)
    text = random.choice(SPELLED).format(word=word)
    return Question('spell', f'word {word}', text, f'{word}: {"-".join(word)}.')


def ask_to_spell_backwards(random: Random) -> Question:
    word = choose_word(random)
    text = random.choice(SPELLED_BACKWARDS).format(word=word)
    answer = f'{word} backwards: {"-".join(reversed(word))}.'
    return Question('spell backwards', f'word {word}', text, answer)


# Days and months

DAYS = ('Monday', 'Tuesday', 'Wednesday', 'Thursday', 'Friday', 'Saturday', 'Sunday')
MONTHS = ('January', 'February', 'March', 'April', 'May', 'June', 'July', 'August', 'September',
          'October', 'November', 'December')
LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ORDINALS = ('first', 'second', 'third', 'fourth', 'fifth', 'sixth', 'seventh', 'eighth', 'ninth',
            'tenth', 'eleventh', 'twelfth')

NEIGHBOURS = (
    'What {unit} comes {side} {name}?',
    'Which {unit} comes {side} {name}?',
    'What is the {unit} {side} {name}?',
    'Which {unit} is {side} {name}?',
    'What comes {side} {name}?',
    'Tell me the {unit} {side} {name}.',
    'Tell me which {unit} comes {side} {name}.',
    'Do you know what {unit} comes {side} {name}?',
    'Can you tell me the {unit} {side} {name}?',
    'Please name the {unit} {side} {name}.',
)
LENGTHS_OF_MONTHS = (
    'How many days has {month}?',
    'How many days does {month} have?',
    'How many days are in {month}?',
    'How many days are there in {month}?',
    'How long is {month}?',
    'Tell me how many days {month} has.',
    'Do you know how many days {month} has?',
    'What is the number of days in {month}?',
)
PLACES_OF_MONTHS = (
    'What is the {ordinal} month?',
    'What is the {ordinal} month of the year?',
    'Which month is the {ordinal}?',
    'Which is the {ordinal} month of the year?',
    'Name the {ordinal} month.',
    'Tell me the {ordinal} month of the year.',
    'Can you name the {ordinal} month?',
)


def ask_for_neighbour(random: Random) -> Question:
    """The day or the month before or after another one."""
    unit, names = random.choice((('day', DAYS), ('month', MONTHS)))
    side, step = random.choice((('before', -1), ('after', 1)))
    number = random.randrange(len(names))
    name = names[number]
    text = random.choice(NEIGHBOURS).format(unit=unit, side=side, name=name)
    neighbour = names[(number + step) % len(names)]
    return Question('calendar', plain(text), text, f'{neighbour} comes {side} {name}.')


def ask_for_length(random: Random) -> Question:
    number = random.randrange(12)
    month = MONTHS[number]
    text = random.choice(LENGTHS_OF_MONTHS).format(month=month)
    answer = f'{month} has {LENGTHS[number]} days.'
    if month == 'February':
        answer = 'February has 28 days, and 29 in a leap year.'
    return Question('calendar', plain(text), text, answer)


def ask_for_place(random: Random) -> Question:
    number = random.randrange(12)
    text = random.choice(PLACES_OF_MONTHS).format(ordinal=ORDINALS[number])
    return Question('calendar', text, text,
                    f'{MONTHS[number]} is the {ORDINALS[number]} month.')


def ask_for_calendar(random: Random) -> Question:
    ask = random.choice((ask_for_neighbour, ask_for_neighbour, ask_for_length, ask_for_place))
    return ask(random)


# Small talk: {answer: (beginnings, middles, endings)} of what a user says

HELP = 'What can I do for you?'
SMALL_TALK = {
    f'Hello! {HELP}': (
        ('Hello', 'Hi', 'Hey', 'Hello there', 'Hi there', 'Hey there', 'Greetings', 'Good day'),
        ('', ' GPT', ' friend', ' again', ', my friend', ' to you', ', computer'),
        ('!', '.'),
    ),
    f'Good morning! {HELP}': (
        ('Good morning', 'Hello and good morning', 'A good morning', 'Hi, good morning'),
        ('', ' GPT', ' friend', ' again', ', my friend', ' to you', ', computer'),
        ('!', '.'),
    ),
    f'I am fine, thank you. {HELP}': (
        ('', 'Hello, ', 'Hi, ', 'Hey, ', 'So, '),
        ('how are you', 'how are you today', 'how do you do', 'how is it going', 'are you well',
         'how are things', 'how do you feel', 'how is your day'),
        ('?',),
    ),
    'You are welcome.': (
        ('', 'Great, ', 'Good, ', 'Okay, ', 'Very nice, ', 'Oh, '),
        ('thanks', 'thank you', 'many thanks', 'thank you very much', 'thanks a lot',
         'thank you so much', 'I thank you', 'thanks for your help', 'thank you for your help'),
        ('!', '.'),
    ),
    'Goodbye!': (
        ('', 'Okay, ', 'Well, ', 'I have to go, ', 'That is all, ', 'It is late, '),
        ('bye', 'goodbye', 'see you', 'see you later', 'see you soon', 'see you tomorrow',
         'good night', 'farewell', 'until next time'),
        ('!', '.'),
    ),
    'I can add, sort and spell, and I know the days and months.': (
        ('', 'So, ', 'Tell me, ', 'Please tell me, ', 'And ', 'Now, '),
        ('what can you do', 'what do you know', 'how can you help me', 'what can I ask you',
         'what are you good at', 'what can you tell me', 'what should I ask you',
         'what are you able to do', 'what can you help me with'),
        ('?',),
    ),
    'I am a small GPT, and I like to talk.': (
        ('', 'So, ', 'Tell me, ', 'Please tell me, ', 'And ', 'Now, '),
        ('who are you', 'what are you', 'what is your name', 'do you have a name',
         'who am I talking to', 'are you a robot', 'are you a human', 'are you a computer'),
        ('?',),
    ),
    'I do not know that. I know sums, sorting, spelling, days and months.': (
        ('What is the price of ', 'Who invented ', 'Can you tell me about ',
         'What is the history of ', 'Why do people like ', 'Where can I buy ', 'Who likes ',
         'Can you write a poem about ', 'Do you know a story about ', 'What do you think of ',
         'Where do I find ', 'How do I make '),
        ('bread', 'the sea', 'cars', 'the moon', 'music', 'gold', 'horses', 'the weather', 'paper',
         'football', 'cheese', 'the telephone', 'Paris', 'trees', 'chess', 'the news', 'coffee',
         'computers', 'Africa', 'love', 'history', 'the stars', 'clocks', 'a garden'),
        ('?',),
    ),
}


def ask_small_talk(random: Random) -> Question:
    answer = random.choice(list(SMALL_TALK))
    text = ''.join(random.choice(parts) for parts in SMALL_TALK[answer])
    text = text[0].upper() + text[1:]
    return Question('small talk', plain(text), text, answer)


# Names

NAMES = '''
    Ada Adam Agnes Alan Albert Alice Amir Amy Anna Anton Arthur Astrid Ben Bella Boris Bruno Carl
    Carla Cecil Clara Cora Dana Daniel David Diana Dora Edgar Elena Ella Emil Emma Erik Esther Eva
    Felix Fiona Flora Frank Fred George Gina Grace Greta Gustav Hana Hanna Harry Helen Henry Hugo
    Ida Igor Ines Ingrid Iris Ivan Jack Jacob Jane Jasper Joan John Jonas Julia Kai Karin Karl Kate
    Klara Kurt Laura Lena Leo Lily Linda Lisa Louis Lucy Luis Magda Marco Maria Mark Marta Max Mia
    Milo Mina Molly Nadia Nina Noah Nora Olga Oliver Omar Oscar Otto Pablo Paul Paula Pedro Peter
    Petra Rafael Ralf Rita Robert Rosa Ruth Sam Samira Sara Selma Simon Sofia Stella Sven Tara
    Theo Thomas Tilda Tim Tina Tom Uma Vera Victor Viola Walter Wanda Willy Yara Yusuf Zoe
    '''.split()
TELLING_A_NAME = (
    'My name is {name}.',
    'I am {name}.',
    'Call me {name}.',
    'You can call me {name}.',
    'Hello, I am {name}.',
    'Hi, my name is {name}.',
)
ASKING_FOR_A_NAME = (
    'What is my name?',
    'Do you know my name?',
    'Who am I?',
    'Tell me my name.',
    'Do you remember my name?',
)
NO_NAME = 'You have not told me your name.'


def choose_name(random: Random) -> str:
    """A name of the list, or one of syllables."""
    if random.random() < SHARE_OF_REAL_WORDS:
        return random.choice(NAMES)
    syllables = [random.choice(CONSONANTS) + random.choice(VOWELS) for _ in range(2)]
    ending = random.choice(('', *CONSONANTS))
    return (''.join(syllables) + ending).capitalize()


def tell_name(random: Random) -> Question:
    name = choose_name(random)
    text = random.choice(TELLING_A_NAME).format(name=name)
    return Question('name', f'name {name}', text, f'Nice to meet you, {name}.')


def ask_for_name(random: Random, before: list[Question]) -> Question:
    """A question for the user's name, which the questions before it may tell. It is never held
    out."""
    answer = NO_NAME
    for question in before:
        if question.kind == 'name':
            answer = f'Your name is {question.key.removeprefix("name ")}.'
    text = vary(random.choice(ASKING_FOR_A_NAME), random)
    return Question('own name', 'own name', text, answer)


# All kinds

KINDS: dict[Callable[[Random], Question], int] = {      # how often each is asked, in shares
    ask_sum: 6,
    ask_to_sort_letters: 2,
    ask_to_sort_numbers: 2,
    ask_to_spell: 2,
    ask_to_spell_backwards: 2,
    ask_for_calendar: 3,
    ask_small_talk: 2,
    tell_name: 1,
}


def ask(random: Random, kind: Callable[[Random], Question] | None = None) -> Question:
    """A question of a kind, or of any, written as people write: some without capitals and marks."""
    if kind is None:
        kinds, shares = zip(*KINDS.items())
        kind, = random.choices(kinds, shares)
    question = kind(random)
    return question._replace(text=vary(question.text, random))


def vary(text: str, random: Random) -> str:
    """The text as it is, or in small letters, perhaps without the mark at its end."""
    style = random.choices(('as it is', 'small', 'plain'), (6, 2, 2))[0]
    if style == 'as it is':
        return text
    if style == 'small':
        return text.lower()
    return plain(text)
