"A tokenizer of whole words, for conversations of a few of them"
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FIRST = ['<pad>', '<s>', '</s>', '<unk>', '<image>', 'USER', 'ASSISTANT', ':', 'what', '?']


def word_tokenizer(words):
    "Of `FIRST`, and of `words`; `<image>` is 4"
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*FIRST, *words])}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.add_special_tokens(['<pad>', '<s>', '</s>', '<image>'])
    return PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token='<pad>', bos_token='<s>', eos_token='</s>', unk_token='<unk>'
    )
