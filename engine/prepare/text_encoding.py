"""Which encoding a text has: by its byte order mark, or by which one decodes it sensibly."""

import codecs
import re

# Marks at the beginning of a file. UTF-32's little-endian one begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF8, 'utf-8'),
    (codecs.BOM_UTF32_LE, 'utf-32-le'),
    (codecs.BOM_UTF32_BE, 'utf-32-be'),
    (codecs.BOM_UTF16_LE, 'utf-16-le'),
    (codecs.BOM_UTF16_BE, 'utf-16-be'),
)
LONGEST_MARK = 4

WESTERN = 'àáâãäåæçèéêëìíîïñòóôõöøœùúûüýßÀÁÂÄÅÆÇÈÉÊËÍÎÑÓÔÖØŒÚÜ‘’‚“”„–—…•«»‹›€£§©®°·¿¡ºª\xa0'
CENTRAL = 'ąćęłńóśźżĄĆĘŁŃÓŚŹŻáčďéěíňřšťúůýžÁČĎÉĚÍŇŘŠŤÚŮÝŽőűŐŰöüÖÜăâîşţ‘’“”„–—…\xa0'
CYRILLIC = 'абвгдежзийклмнопрстуфхцчшщыьэюя'
GREEK = 'αβγδεζηθικλμνξοπρςστυφχψωάέήίόύώ'
KANA = ''.join(map(chr, [*range(0x3041, 0x3094), *range(0x30a1, 0x30f7)]))
JAPANESE = KANA + 'ー、。「」・'
HANGUL = (
    '가각간갈감강개거건것게겠결경계고공과관교구국군그금기까나난날남내너네년노는늘니다단당대더'
    '데도동되된될두드든들등때또라람래러레려력로록료루르른를름리마만말망매며면명모목못무문물미'
    '민바반발방배번법보본부분비사산상생서선설성세소속수스습시식신실심아안않알았야약양어없에여'
    '연영오와요용우운원위유으은을음의이인일입있자작장재저적전정제조종주중지진차참처천청초추치'
    '크타태통특하학한할함해했행현형호화확회후')
MARKS_OF_CHINESE = '，。、：；？！“”（）《》「」'
SIMPLIFIED = MARKS_OF_CHINESE + (
    '的一是不了在人有我他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家'
    '学对可她里后小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见'
    '经头面公同三已老从动两长世界第二今天气很')
TRADITIONAL = MARKS_OF_CHINESE + (
    '的一是不了在人有我他這中大來上國個到說們為子和你地出道也時年得就那要下以生會自著去之過家'
    '學對可她裡後小麼心多天而能好都然沒日於起還發成事只作當想看文無開手十用主行方又如前所本見'
    '經頭面公同三已老從動兩長世界第二今天氣很')

# {encoding: the characters beyond ASCII that are common in its texts}. The first of equals wins.
# Python and iconv know all by these names.
COMMON = {
    'cp1252': WESTERN,
    'cp1250': CENTRAL,
    'cp1251': CYRILLIC,
    'koi8-r': CYRILLIC,
    'cp1253': GREEK,
    'gb18030': SIMPLIFIED,
    'big5': TRADITIONAL,
    'shift_jis': JAPANESE,
    'cp932': JAPANESE,          # what Windows adds to it
    'euc-jp': JAPANESE,
    'euc-kr': HANGUL,
    'cp949': HANGUL,            # what Windows adds to it
}
# In these, a letter beyond ASCII mostly stands alone: in a longer run of them it is none.
SINGLE_LETTERS = ('cp1252', 'cp1250')
LONGEST_RUN = 3
SENSIBLE = 0.25                 # share of the characters beyond ASCII that must be common ones
SHOWN = 24                      # characters of the decoded text in a message


def find_mark(head: bytes) -> tuple[bytes, str | None]:
    """(the byte order mark that a file begins with, its encoding), or (b'', None)."""
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return mark, encoding
    return b'', None


def guess_encoding(sample: bytes) -> str | None:
    """The encoding that decodes a text sensibly, which is not UTF-8; None if none does.

    sample: a part of the text, from the beginning of a character on. Its last one may be cut.
    """
    best = None
    best_score = SENSIBLE
    for encoding, common in COMMON.items():
        score = score_text(decode_sample(sample, encoding), set(common),
                           encoding in SINGLE_LETTERS)
        if score > best_score:
            best = encoding
            best_score = score
    return best


def decode_sample(sample: bytes, encoding: str) -> str:
    """The text of a sample, whose last character may be cut; '' where it is not so encoded."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return ''


def score_text(text, common, stands_alone):
    """The share of a text's characters beyond ASCII that are common ones, 0 to 1."""
    runs = re.findall(r'[^\x00-\x7f]+', text)
    found = 0
    total = 0
    for run in runs:
        total += len(run)
        if not stands_alone or len(run) <= LONGEST_RUN:
            found += sum(character in common for character in run)
    if not total:
        return 0
    return found / total


def guess_wide_encoding(sample: bytes) -> str | None:
    """'utf-16-le' or 'utf-16-be' for a text of it without a mark, by where its NULs are."""
    even = sample[0::2].count(0)
    odd = sample[1::2].count(0)
    half = len(sample) / 2
    if odd > 0.6 * half and not even:
        return 'utf-16-le'
    if even > 0.6 * half and not odd:
        return 'utf-16-be'
    return None


def excerpt(sample: bytes, encoding: str) -> str:
    """The text around the first character beyond ASCII, to show how an encoding reads it."""
    text = ' '.join(decode_sample(sample, encoding).split())
    match = re.search(r'[^\x00-\x7f]', text)
    begin = 0
    if match:
        begin = max(0, match.start() - SHOWN // 3)
    return text[begin:begin + SHOWN].strip()
