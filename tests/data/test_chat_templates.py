"What is trained is exactly the answers with their end tokens, for each kind of tokenizer and template."

import itertools

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from libmoe_nb.data.conversations import ConversationData, Sample, collate, encode, image_token
from libmoe_nb.data.templates import answer_spans, plain_template

SPECIAL = [
    '<pad>',
    '<s>',
    '</s>',
    '<unk>',
    '<image>',
    '<|end|>',
    '<|im_start|>',
    '<|im_end|>',
    '<|user|>',
    '<|assistant|>',
    '<|system|>',
    '<|endoftext|>',
    '<|eot_id|>',
    '<|start_header_id|>',
    '<|end_header_id|>',
]
TEXT = [
    'USER: what is this ? ASSISTANT: a cat',
    '\nuser\nassistant\nsystem\n[INST] [/INST]',
    'the quick brown fox yes no: Yes. No.',
    'x = [1, 2, 3]\n    return x',
    'ünïcödé 猫 🙂 ...',
] * 3

# Phi-3.5's own, whose end of text follows whatever comes last
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] "
    "%}{{'<|system|>\n' + message['content']"
    " + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif "
    "message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] "
    "}}<|end_header_id|>\n\n{{ m['content'] | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
# llava-hf's own: parts, marks, and no end at all
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', "
    "'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATES = dict(
    phi3=(PHI3, '<|end|>'),
    chatml=(CHATML, '<|im_end|>'),
    chatml_marked=(CHATML_MARKED, '<|im_end|>'),
    llama3=(LLAMA3, '<|eot_id|>'),
    llama2=(LLAMA2, '</s>'),
    llava=(LLAVA, '</s>'),
    plain=(plain_template, '</s>'),
)


def byte_level(use_regex=True, trim=True):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return t


def prefixed():
    "As Llama's: one token, or the beginning of one, in front of every piece between special tokens"
    t = Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    t.pre_tokenizer = pre_tokenizers.Split('▁', 'merged_with_next')
    t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
    t.train_from_iterator(
        [x.replace('\n', ' \n ') for x in TEXT],
        trainers.BpeTrainer(
            vocab_size=700, show_progress=False, special_tokens=SPECIAL + [f'<0x{i:02X}>' for i in range(256)]
        ),
    )
    return t


def words():
    t = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate(dict.fromkeys(SPECIAL + ' '.join(TEXT).split() + ANSWER_WORDS))},
            unk_token='<unk>',
        )
    )
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t


SAMPLES = [
    Sample(str(i), tuple(turns), tuple(range(sum(t.count('<image>') for _, t in turns))))
    for i, turns in enumerate(
        [
            [('user', '<image>\nwhat is this ?'), ('assistant', 'a cat')],
            [
                ('user', 'is it ?'),
                ('assistant', 'yes'),
                ('user', 'and this ?'),
                ('assistant', 'no'),
                ('user', 'this ?'),
                ('assistant', 'yes'),
            ],
            [('user', '<image>\n<image>\nwhat ?'), ('assistant', 'assistant'), ('user', 'user'), ('assistant', 'user')],
            [('user', '<image>'), ('assistant', 'x = [1, 2, 3]\n    return x')],
            [('user', 'ünïcödé'), ('assistant', '猫 🙂'), ('user', '...'), ('assistant', '...')],
            [('system', 'the quick brown fox'), ('user', '<image>\nwho ?'), ('assistant', ': Yes. No.')],
        ]
    )
]
ANSWER_WORDS = ' '.join(t for s in SAMPLES for _, t in s.turns).split()


def made(backend, **kw):
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token='<s>', eos_token='</s>', unk_token='<unk>', **(dict(pad_token='<pad>') | kw)
    )


@pytest.fixture(scope='module')
def tokenizers():
    return dict(
        words=made(words()),
        bytes=made(byte_level()),
        merges=made(byte_level(use_regex=False)),
        prefixed=made(prefixed()),
    )


def squeezed(text):
    return ''.join(text.split())


def runs(e):
    for trained, group in itertools.groupby(zip(e['input_ids'], e['labels']), key=lambda p: p[1] != -100):
        if trained:
            yield [l for _, l in group]


@pytest.mark.parametrize('name', ['words', 'bytes', 'merges', 'prefixed'])
@pytest.mark.parametrize('template', TEMPLATES)
def test_trap_labels_are_the_answers_and_their_ends(tokenizers, name, template):
    tok, (chat, end) = tokenizers[name], TEMPLATES[template]
    refused = 0
    for s in SAMPLES:
        try:
            e = encode(s, tok, 3, chat_template=chat)
        except ValueError as why:
            # only where merges go over everything, and never silently
            assert name == 'merges' and 'a token holds the end of the prompt' in str(why)
            refused += 1
            continue
        answers = [t for r, t in s.turns if r == 'assistant']
        assert [squeezed(tok.decode(r)) for r in runs(e)] == [squeezed(a + end) for a in answers]
        # the end is trained as its own token, and nothing else is
        assert sum(l == tok.convert_tokens_to_ids(end) for l in e['labels']) == len(answers)
        assert all(l in (-100, i) for i, l in zip(e['input_ids'], e['labels']))
        assert e['input_ids'].count(image_token(tok)) == 3 * len(s.images) and not e['cut']
    assert name == 'merges' or not refused


@pytest.mark.parametrize('name', ['words', 'bytes', 'prefixed'])
@pytest.mark.parametrize('template', ['llava', 'chatml_marked'])
def test_marks_and_prompts_agree_where_a_template_has_both(tokenizers, name, template):
    tok, (chat, _) = tokenizers[name], TEMPLATES[template]
    for s in SAMPLES:
        found = [answer_spans(tok, s.turns, chat, marks=m) for m in (True, False)]
        assert found[0][0] == found[1][0]
        by = [[text[a:b].strip() for a, b in spans] for text, spans in found]
        assert by[0] == by[1] and len(by[0]) == sum(r == 'assistant' for r, _ in s.turns)


def test_marks_find_answers_where_earlier_turns_change(tokenizers):
    "Templates of models that think drop earlier thoughts: only marks tell where answers stand"
    changes = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% if "
        "loop.last %}hm{% endif %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] "
        "}}<|im_end|>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tok = tokenizers['bytes']
    text, spans = answer_spans(tok, SAMPLES[1].turns, changes)
    assert [text[a:b] for a, b in spans] == ['yes<|im_end|>', 'no<|im_end|>', 'yes<|im_end|>']
    with pytest.raises(ValueError, match='earlier turns the same'):
        answer_spans(tok, SAMPLES[1].turns, changes, marks=False)


def test_trap_truncation_never_inside_an_image_and_never_silent(tokenizers):
    tok = tokenizers['bytes']
    for s in SAMPLES:
        whole = encode(s, tok, 3)
        n, answers = len(whole['input_ids']), sum(r == 'assistant' for r, _ in s.turns)
        for most in range(1, n + 1):
            try:
                e = encode(s, tok, 3, most)
            except ValueError as why:
                assert 'beyond max_length' in str(why) or 'no answer begins' in str(why)
                continue
            assert e['input_ids'] == whole['input_ids'][:most] and e['cut'] == (most < n)
            assert e['input_ids'].count(image_token(tok)) == 3 * len(s.images)
            assert e['lost'] == answers - len(list(runs(e))) < answers


def test_cut_samples_are_counted_and_named(tokenizers):
    tok = tokenizers['bytes']
    most = len(encode(SAMPLES[0], tok, 3)['input_ids'])
    data = ConversationData([Sample(s.id, s.turns, s.images) for s in SAMPLES], tok, lambda im: im, 3, max_length=most)
    assert '0' not in data.cut and data.cut and all(str(c) in repr(data) for c in data.cut[:3])
    assert len(data) + len(data.left_out) == len(SAMPLES)


@pytest.mark.parametrize('pad', ['</s>', '<|endoftext|>', None])
def test_trap_a_pad_token_that_is_a_real_token_stays_attended(pad):
    tok = made(byte_level(), **(dict(pad_token=pad) if pad else {}))
    if pad is None:
        tok.pad_token = None
    data = ConversationData([Sample(s.id, s.turns) for s in SAMPLES if not s.images], tok, None, 3)
    for left in (False, True):
        b = collate(data.encoded, data.pad, left)
        for row, (e, mask) in enumerate(zip(data.encoded, b['attention_mask'].bool())):
            assert mask.sum() == len(e['input_ids']) and b['input_ids'][row][mask].tolist() == e['input_ids']
            assert (b['labels'][row][~mask] == -100).all() and b['labels'][row][mask].tolist() == e['labels']
    if pad == '</s>':
        assert (b['labels'] == tok.eos_token_id).sum() == sum(
            r == 'assistant' for e in data.samples for r, _ in e.turns
        )


@pytest.mark.parametrize('text', ['say </s> now', 'a <|im_end|> b', '<s>'])
@pytest.mark.parametrize('who', ['user', 'assistant'])
def test_words_that_are_special_tokens_are_named(tokenizers, text, who):
    turns = (('user', text if who == 'user' else 'hi'), ('assistant', text if who == 'assistant' else 'ho'))
    with pytest.raises(ValueError, match='a turn holds the special token <'):
        encode(Sample('x', turns), tokenizers['bytes'], 3)


def test_what_is_written_to_ask_begins_what_was_trained(tokenizers):
    "The prompt's tokens are those in front of the answer in training, so that nothing else is asked than was learnt"
    for name in ('words', 'bytes', 'prefixed'):
        tok = tokenizers[name]
        for template in ('plain', 'llava', 'phi3', 'llama3', 'chatml'):
            chat, s = TEMPLATES[template][0], SAMPLES[0]
            e = encode(s, tok, 1, chat_template=chat)
            first = next(i for i, l in enumerate(e['labels']) if l != -100)
            parts = [dict(role='user', content=[dict(type='image'), dict(type='text', text='what is this ?')])]
            turns = parts if template == 'llava' else [dict(role='user', content=s.turns[0][1])]
            asked = tok.apply_chat_template(turns, chat_template=chat, add_generation_prompt=True, tokenize=False)
            assert tok(asked, add_special_tokens=False).input_ids == e['input_ids'][:first], (name, template)


def test_a_tokenizer_that_grows_is_looked_at_again():
    tok, s = made(words()), Sample('x', (('user', 'say <halt>'), ('assistant', 'no')))
    encode(s, tok, 3)
    tok.add_special_tokens(dict(additional_special_tokens=['<halt>']))
    with pytest.raises(ValueError, match='special token <halt>'):
        encode(s, tok, 3)
