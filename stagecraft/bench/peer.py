"""The peers' side of `stagecraft bench --peers=ENV`: the same work by torch and TRL.

Run by the Python of another environment, with nothing of this package:

    ENV/bin/python peer.py pretrain '{"vocab_size": 4096, ...}'

It prints what it measures with, then does one step for each line that it reads, and
prints its seconds, CPU seconds and tokens. So two programs take turns on one machine,
step by step. The work is that of `timing.CASES`: a Llama of the same shape with random
weights, on random text of the same lengths.
"""

import contextlib
import copy
import json
import os
import random
import string
import sys
import tempfile
import time

# Threads that wait for work must not take the processor while the other side is timed.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

PAD, END = 0, 1
FOREVER = 10**6  # steps of a trainer, which ends when nobody asks for more


class Ended(Exception):
    """Nobody asks for another step."""


class Turns:
    """Waits for its turn, and says what the step took.

    Args:
        out: where the lines go.
    """

    def __init__(self, out):
        self.out, self.started = out, None

    def begin(self):
        if not sys.stdin.readline().strip():
            raise Ended
        self.started = time.perf_counter(), time.process_time()

    def end(self, tokens):
        wall, cpu = self.started
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.say(seconds=wall, cpu_seconds=cpu, tokens=tokens)

    def say(self, **line):
        print(json.dumps(line), file=self.out, flush=True)

    def take(self, step, tokens):
        self.begin()
        step()
        self.end(tokens)


def llama(shape, **more):
    """Returns transformers' config of the model of `bench.MODEL`."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["width"],
        intermediate_size=shape["ff_width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=shape["max_length"],
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=END,
        **more,
    )


def tokenizer(shape):
    """Makes a tokenizer of one token a word: a text of n words has n tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "</s>": END, "<|user|>": 2, "<|assistant|>": 3, "<unk>": 4}
    words |= {_word(i): i for i in range(5, shape["vocab_size"])}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words_apart = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    words_apart.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|user|> {{ m['content'] }}"
        " {% else %}<|assistant|> {% generation %}{{ m['content'] }} </s> "
        "{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    return words_apart


def _word(number):
    letters = string.ascii_lowercase
    return "".join(letters[number // 26**i % 26] for i in range(3))


def text(count, rng, shape):
    return " ".join(_word(rng.randrange(5, shape["vocab_size"])) for _ in range(count))


def pretrain(shape, turns):
    """A plain loop around torch.compile."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(llama(shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = torch.compile(model)
    ids = torch.randint(5, shape["vocab_size"], (16, 256))

    def step():
        loss = run(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    while True:
        turns.take(step, ids.numel())


def sample(shape, turns, rows):
    """`generate` with a cache: 32 tokens in, 128 out."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(llama(shape)).eval()
    ids = torch.randint(5, shape["vocab_size"], (rows, 32))

    def step():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=128,
            min_new_tokens=128,
            do_sample=True,
        )

    while True:
        turns.take(step, rows * 128)


def _in_turns(trainer_class, turns, count):
    """Makes a TRL trainer whose every training step waits for its turn."""

    class InTurns(trainer_class):
        def training_step(self, model, inputs, *args, **kwargs):
            turns.begin()
            loss = super().training_step(model, inputs, *args, **kwargs)
            turns.end(count(inputs))
            return loss

    return InTurns


def _settings(rows, folder):
    return dict(
        output_dir=folder,
        per_device_train_batch_size=rows,
        max_steps=FOREVER,
        report_to=[],
        use_cpu=True,
        bf16=False,
        logging_steps=FOREVER,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )


def _saved(shape, folder):
    from transformers import LlamaForCausalLM

    own = tokenizer(shape)
    LlamaForCausalLM(llama(shape)).save_pretrained(folder)
    own.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder), own


def _tokens(inputs):
    return int(inputs["input_ids"].numel())


def sft(shape, turns, folder):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rng, (model, own) = random.Random(0), _saved(shape, folder)

    def dialogue():
        turn = dict(role="user", content=text(26, rng, shape))
        answer = dict(role="assistant", content=text(56, rng, shape))
        return dict(messages=[turn, answer])

    trainer = _in_turns(SFTTrainer, turns, _tokens)(
        model=model,
        args=SFTConfig(
            max_length=256,
            packing=True,
            assistant_only_loss=True,
            **_settings(16, folder),
        ),
        train_dataset=Dataset.from_list([dialogue() for _ in range(2400)]),
        processing_class=own,
    )
    trainer.train()


def dpo(shape, turns, folder):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rng, (model, own) = random.Random(0), _saved(shape, folder)

    def pair():
        sides = {k: " " + text(164, rng, shape) for k in ("chosen", "rejected")}
        return dict(prompt=text(60, rng, shape), **sides)

    trainer = _in_turns(DPOTrainer, turns, _tokens)(
        model=model,
        args=DPOConfig(max_length=256, **_settings(8, folder)),
        train_dataset=Dataset.from_list([pair() for _ in range(512)]),
        processing_class=own,
    )
    trainer.train()


def grpo(shape, turns, folder):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rng, (model, own) = random.Random(0), _saved(shape, folder)
    trainer = _in_turns(GRPOTrainer, turns, lambda inputs: 16 * 64)(
        model=model,
        args=GRPOConfig(
            num_generations=4,
            max_completion_length=64,
            beta=0.04,
            **_settings(16, folder),
        ),
        train_dataset=Dataset.from_list(
            [dict(prompt=text(32, rng, shape)) for _ in range(256)]
        ),
        processing_class=own,
        reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
    )
    trainer.train()


def ppo(shape, turns, folder):
    """TRL's PPO, of which 1.12 has the last: an iteration ends where it logs."""
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    rng, (model, own) = random.Random(0), _saved(shape, folder)
    own.padding_side = "left"
    reward, value = (
        LlamaForSequenceClassification(llama(shape, num_labels=1)) for _ in range(2)
    )
    prompts = [dict(input_ids=own(text(32, rng, shape))["input_ids"])] * 4096
    settings = _settings(16, folder)
    for key in ("max_steps", "disable_tqdm"):
        del settings[key]
    settings["logging_steps"] = 1
    trainer = PPOTrainer(
        args=PPOConfig(
            num_mini_batches=1,
            num_ppo_epochs=4,
            total_episodes=16 * 10**4,
            response_length=64,
            local_rollout_forward_batch_size=16,
            num_sample_generations=0,
            kl_coef=0.05,
            **settings,
        ),
        processing_class=own,
        model=model,
        ref_model=copy.deepcopy(model),
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list(prompts),
        eval_dataset=Dataset.from_list(prompts[:16]),
    )

    class Iterations(TrainerCallback):
        def on_log(self, *args, **kwargs):
            if turns.started is not None:
                turns.end(16 * 64)
            turns.begin()

    trainer.add_callback(Iterations())
    trainer.train()


TRAINERS = dict(sft=sft, dpo=dpo, grpo=grpo, ppo=ppo)
NAMES = ("pretrain", *TRAINERS)  # and sample_ROWS


def main(name, shape):
    """Serves the steps of one of `bench`'s figures; `sample_16` samples 16 rows."""
    # Libraries print as they please: their lines go where they are in nobody's way.
    with os.fdopen(os.dup(1), "w") as out, contextlib.suppress(Ended):
        os.dup2(2, 1)
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        if name == "ppo" and "TRL_PPO" in os.environ:
            sys.path.insert(0, os.environ["TRL_PPO"])
        import torch
        import transformers

        versions = dict(torch=torch.__version__, transformers=transformers.__version__)
        torch.manual_seed(0)
        turns = Turns(out)
        if name in TRAINERS:
            import trl

            turns.say(**versions, trl=trl.__version__)
            with tempfile.TemporaryDirectory() as folder:
                TRAINERS[name](shape, turns, folder)
        turns.say(**versions)
        if name == "pretrain":
            pretrain(shape, turns)
        sample(shape, turns, int(name.removeprefix("sample_")))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
