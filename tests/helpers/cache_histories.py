"""Caches of transformers and what can happen to them: models, classes and histories for transformers/test_caches.py.

A history drives one model with one cache and returns the logits of all its calls. The same history under "sdpa" says
what they must be, so nothing here knows what a cache does.
"""

import inspect

import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache

from tests.helpers.cache_argument import CACHE

ROOM = 600
TURN = 130  # queries that the operator does not leave to SDPA
WINDOW = 140  # sliding layers keep all of one turn, and forget keys in the next
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "pad_token_id": 0,
}
BART = {
    "vocab_size": 97,
    "d_model": 32,
    "max_position_embeddings": 1024,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "eos_token_id": None,
    **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
}
HYBRID = {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
CHUNKED = {
    "head_dim": 8,
    "attention_chunk_size": WINDOW,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "num_local_experts": 2,
    "intermediate_size_mlp": 48,
}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    # The second layer's keys depend on the first one's attention, so that quantising them would enlarge any rounding.
    "llama-1": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"num_hidden_layers": 1}),
    "mistral": ("MistralForCausalLM", "MistralConfig", SIZES | {"sliding_window": WINDOW}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SIZES | HYBRID),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", SIZES | CHUNKED),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", SIZES | {"layer_types": ["conv", "full_attention"]}),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
}
CACHES = {
    "dynamic": ("llama", lambda config: DynamicCache()),
    "dynamic_all_keys": ("mistral", lambda config: DynamicCache()),  # without a config no layer slides
    "dynamic_sliding": ("mistral", lambda config: DynamicCache(config=config)),
    "dynamic_hybrid": ("gemma3", lambda config: DynamicCache(config=config)),
    "dynamic_chunked": ("llama4", lambda config: DynamicCache(config=config)),
    "dynamic_offloaded": ("gemma3", lambda config: DynamicCache(config=config, offloading=True)),
    "dynamic_convolutional": ("lfm2", lambda config: DynamicCache(config=config)),
    "static": ("llama", lambda config: StaticCache(config=config, max_cache_len=ROOM)),
    "static_sliding": ("mistral", lambda config: StaticCache(config=config, max_cache_len=ROOM)),
    "static_hybrid": ("gemma3", lambda config: StaticCache(config=config, max_cache_len=ROOM)),
    "static_chunked": ("llama4", lambda config: StaticCache(config=config, max_cache_len=ROOM)),
    "static_offloaded": ("gemma3", lambda config: StaticCache(config=config, max_cache_len=ROOM, offloading=True)),
    "static_convolutional": ("lfm2", lambda config: StaticCache(config=config, max_cache_len=ROOM)),
    "encoder_decoder": ("bart", lambda config: EncoderDecoderCache(DynamicCache(), DynamicCache())),
    "encoder_decoder_static": (
        "bart",
        lambda config: EncoderDecoderCache(
            StaticCache(config=config, max_cache_len=ROOM), StaticCache(config=config, max_cache_len=30)
        ),
    ),
}
if '"fp8"' in inspect.getsource(QuantizedCache):  # the only backend that needs no other package
    CACHES["quantized"] = ("llama-1", lambda config: QuantizedCache("fp8", config))


def tiny(name, layers=None):
    """A model of 1 or 2 layers, or of as many as asked for, its attention sharper than at initialisation."""
    torch.manual_seed(0)
    model, config, sizes = MODELS[name]
    sizes = sizes | ({} if layers is None else {"num_hidden_layers": layers})
    config = getattr(transformers, config)(**sizes, attn_implementation="sdpa")
    model = getattr(transformers, model)(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2)
    return model


def tokens(batch, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (batch, length), generator=generator, device="cpu").to(torch.get_default_device())


class Conversation:
    """One model and one cache, call by call.

    Args:
        model: The model, or what came of compiling it.
        cache: An empty cache.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.logits = []
        self._mask = None

    def say(self, length, batch=2, padding=0):
        """The next call, of ``length`` tokens; the first ``padding`` tokens of the first row are none."""
        ids = tokens(batch, length, seed=len(self.logits))
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, :padding] = False
        self._mask = mask if self._mask is None else torch.cat([self._mask, mask], dim=1)
        given = {"attention_mask": self._mask.clone(), "input_ids": ids}
        if self.model.config.is_encoder_decoder:
            given = {"decoder_attention_mask": given["attention_mask"], "decoder_input_ids": ids}
            given["input_ids"] = tokens(batch, 30)
        logits = self.model(**given, **{CACHE: self.cache}).logits
        self.logits.append(logits[mask])

    def reset(self):
        """An empty cache again."""
        self.cache.reset()
        self._mask = None

    def crop(self, count):
        self.cache.crop(-count)
        self._mask = self._mask[:, :-count]

    def rows(self, index):
        """The rows of the batch are taken anew."""
        self._mask = self._mask[index]


def fresh(talk):
    talk.say(200)


def second_turn(talk):
    talk.say(TURN)
    talk.say(TURN)


def chunks(talk):
    for length in (TURN, TURN + 3, TURN - 1, 1, 20):
        talk.say(length)


def below_the_window(talk):
    for length in (3, 1, 128, 5):
        talk.say(length)


def left_padding(talk):
    talk.say(TURN, padding=6)
    talk.say(TURN)
    talk.say(1)


def reset(talk):
    talk.say(TURN)
    talk.say(TURN)
    talk.reset()
    talk.say(TURN + 4)
    talk.say(TURN + 5)


def reordered(talk):
    talk.say(TURN)
    index = torch.tensor([1, 0])
    talk.cache.reorder_cache(index)
    talk.rows(index)
    talk.say(TURN)


def cropped(talk):
    if hasattr(talk.cache, "activate_past_recording"):
        talk.cache.activate_past_recording()
    talk.say(TURN)
    talk.crop(3)
    talk.say(TURN)
    talk.crop(4)
    talk.say(11)


def repeated(talk):
    talk.say(TURN, padding=3)
    talk.cache.batch_repeat_interleave(2)
    talk.rows(torch.tensor([0, 0, 1, 1]))
    talk.say(TURN, batch=4)


def selected(talk):
    talk.say(TURN, padding=3)
    talk.cache.batch_select_indices(torch.tensor([1]))
    talk.rows(torch.tensor([1]))
    talk.say(TURN, batch=1)


EVERY = (fresh, second_turn, chunks, below_the_window, left_padding, reset, reordered)
DYNAMIC = (cropped, repeated, selected)
HISTORIES = {history.__name__: history for history in EVERY + DYNAMIC}


def histories_of(cache):
    """Names of what a cache allows: transformers crops and repeats no static cache, and no state of a convolution."""
    if "static" in cache or cache == "quantized":
        return [history.__name__ for history in EVERY]
    return [name for name in HISTORIES if "convolutional" not in cache or name not in ("repeated", "selected")]


def logits(model, cache, history):
    """The logits [tokens, vocabulary] of every call of a history, tokens that are padding left out."""
    talk = Conversation(model, cache)
    with torch.no_grad():
        HISTORIES[history](talk)
    return talk.logits
