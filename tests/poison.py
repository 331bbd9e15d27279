"""Poison a step of a run, so that the run must skip it."""

import torch

from mimkit.training.feed import Feed


def poison(monkeypatch, step):
    """Multiply the images of a step by NaN, each time that the run comes to it."""
    start, micro_batches = Feed.start, Feed.micro_batches

    def started(feed, first):
        feed.next_step = first
        start(feed, first)

    def poisoned(feed):
        current, feed.next_step = feed.next_step, feed.next_step + 1
        return (spoil(batch) if current == step else batch for batch in micro_batches(feed))

    monkeypatch.setattr(Feed, "start", started)
    monkeypatch.setattr(Feed, "micro_batches", poisoned)


def spoil(batch):
    """Multiply the images of a batch, stacked or a list, by NaN."""
    images = batch.images
    return batch._replace(images=[x * torch.nan for x in images] if isinstance(images, list) else images * torch.nan)
