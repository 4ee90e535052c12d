"Cutting text: any text, and code that begins or ends anywhere."
import re, unicodedata
from hypothesis import given, settings, strategies as st
from made_stories import CODE
from libmoe_nb.evaluation.pieces import PIECE, code_lines, sentence_spans
from libmoe_nb.evaluation.suites import make_suite

@given(st.text(max_size=300))
@settings(max_examples=100, deadline=None)
def test_cutting_text(text):
    for a, b in sentence_spans(text): assert text[a:b].strip() and not text[a].isspace()
    for line in code_lines(text): assert 0 <= line.start < line.end <= len(text) and line.tokens
    assert (''.join(PIECE.findall(text)) == ''.join(re.findall(r'\n[ \t]*|[^\s]', text))
            or any(unicodedata.category(c)[0] == 'M' for c in text))

def test_code_from_the_middle():
    "A document that begins inside of a function and ends inside of a bracket"
    text = CODE[0][CODE[0].index('        total'):] + '\nprint((1,\n'
    lines = [text[l.start:l.end] for l in code_lines(text)]
    assert len(lines) > 100 and all(not l.startswith('"') or l.endswith('"') for l in lines)
    assert make_suite([text], ['bracket', 'indentation', 'name'], 15,
                      code=True).tasks.keys() == {'bracket_text', 'indentation_text', 'name_text'}
