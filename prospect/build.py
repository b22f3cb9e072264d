"""From a configuration to what training needs: tokenizer, corpus, model."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from prospect.check import refuse_without_updates, usable_clips
from prospect.clip_files import open_source
from prospect.clips import Clip
from prospect.config import Config
from prospect.data import Corpus, as_streamed
from prospect.distributed import Ranks, from_main, together
from prospect.errors import ProspectError
from prospect.memory import check_model_fits
from prospect.model import ModelConfig, Prospect
from prospect.plan import Plan, Wanted, plan_both
from prospect.sample import write_sample
from prospect.sequence import clip_prompt, lay_out
from prospect.tokenizer import SPOKEN, Tokenizer, train_tokenizer
from prospect.tune import meta_model, storage_dtype
from prospect.weights import Stored, open_model


def run_directory(config: Config) -> Path:
    return Path(config.run.out) / config.run.name


def make_sample_corpus(config: Config) -> None:
    """Write the sample corpus where data.train expects it, if it is asked for and not there."""
    path = Path(config.data.train_files()[0].path)
    if config.data.sample is None or path.exists():
        return
    if len(config.data.train) != 1 or path.name != "train.json":
        remedy = "let data.train be FOLDER/train.json, or set data.sample to null"
        raise ProspectError("data.sample makes one file, train.json", where=str(path), remedy=remedy)
    print(f"making the sample corpus ({config.data.sample}) in {path.parent}", flush=True)
    write_sample(path.parent, seed=0, difficulty=config.data.sample)


def load_tokenizer(config: Config) -> Tokenizer:
    """The backbone's tokenizer; for a model from scratch a small BPE trained on the training clips, kept in the run."""
    if config.model.backbone is not None:
        return Tokenizer(config.model.backbone, config.data.template)
    if config.data.template != "plain":
        what = f"data.template={config.data.template} belongs to a pretrained backbone"
        raise ProspectError(what, where="config", remedy="data.template=plain for a model trained from scratch")
    directory = run_directory(config) / "tokenizer"
    if not (directory / "tokenizer_config.json").exists():
        # Bad clips are reported, or left out, before anything is learned from them and written.
        folder, outside = config.data.embeddings, config.data.embeddings_outside
        sources = [open_source(file.path, folder, outside) for file in config.data.train_files()]
        usable = usable_clips(sources, config.data, config.model.vision_dim)
        refuse_without_updates(usable.updates, config.data)
        clips = (sources[number].file.clip(index) for number, index in usable.clips)
        train_tokenizer(_training_texts(clips, config), config.model.vocab_size, directory)
    return Tokenizer(directory, config.data.template)


def _training_texts(clips: Iterable[Clip], config: Config) -> Iterator[str]:
    """What a model of these clips reads and writes: prompts and turns."""
    for clip in clips:
        yield clip_prompt(clip, clip.initial_state, config.data)
        for said in lay_out(clip, config.data, 0.0, 0, 0).said:
            yield f"{SPOKEN[said.role]} {said.text}"  # as the plain template writes it


def load_corpus(config: Config, tokenizer: Tokenizer, split: str, plan: Plan | None = None) -> Corpus:
    """split: train, or val, which sees every frame, as streaming does. plan: by default it is made here."""
    rate = config.data.val_neg_frame_sampling_rate if split == "val" else config.data.neg_frame_sampling_rate
    of = what_to_plan(config, tokenizer, split)
    return Corpus(of.paths, of.config, tokenizer, of.vision_dim, rate=rate, seed=of.seed, repeats=of.repeats, plan=plan)


def what_to_plan(config: Config, tokenizer: Tokenizer, split: str) -> Wanted:
    data, rest = config.data, (tokenizer, config.model.vision_dim, config.run.seed)
    if split == "val":
        return Wanted(data.val, as_streamed(data), *rest, [1] * len(data.val))
    files = data.train_files()
    return Wanted([file.path for file in files], data, *rest, [file.repeat for file in files])


def load_corpora(config: Config, tokenizer: Tokenizer, ranks: Ranks) -> tuple[Corpus, Corpus, list[str]]:
    """The corpora for training and validation, and a warning, or none, where they share clips that they may share.

    Rank 0 plans, with all cores of its machine, and the others receive its plans. Raises ProspectError.
    """
    splits, made = ("train", "val"), None
    with together(ranks):
        if ranks.main:
            wanted = [what_to_plan(config, tokenizer, split) for split in splits]
            made = plan_both(*wanted, allow_leaks=config.data.allow_leaks)
    *plans, shared = from_main(made, ranks)
    with together(ranks):
        train, val = (load_corpus(config, tokenizer, split, plan) for split, plan in zip(splits, plans))
    return train, val, shared


def model_shape(config: Config, tokenizer: Tokenizer) -> ModelConfig:
    """The shape of a model trained from scratch."""
    m = config.model
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_hidden_layers=m.num_hidden_layers,
        num_attention_heads=m.num_attention_heads,
        num_key_value_heads=m.num_key_value_heads,
        head_dim=m.hidden_size // m.num_attention_heads,
        max_position_embeddings=config.data.max_seq_len,
        rope_theta=m.rope_theta,
        tie_word_embeddings=m.tie_word_embeddings,
        vision_dim=m.vision_dim,
        image_token_id=tokenizer.image_id,
        speaking_head=m.speaking_head,
        dst=config.data.dst,
        dst_state_head=m.dst_state_head and config.data.dst,
    )


def new_model(config: Config, tokenizer: Tokenizer) -> tuple[Prospect, dict[str, Stored]]:
    """A new model on the meta device, and where the backbone stores its tensors; `fill_model` draws all others."""
    if config.model.backbone is None:
        check_model_fits(model_shape(config, tokenizer))
        return meta_model(model_shape(config, tokenizer)), {}
    settings = {
        "vision_dim": config.model.vision_dim,
        "image_token_id": tokenizer.image_id,
        "speaking_head": config.model.speaking_head,
        "dst": config.data.dst,
        "dst_state_head": config.model.dst_state_head and config.data.dst,
    }
    model, stored = open_model(config.model.backbone, settings, storage_dtype(config.train))
    tokenizer.check_vocabulary(model.config.vocab_size)
    return model, stored
