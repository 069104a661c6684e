"""k-NN, and the classifier where there is one, while training: how good the encoder is so far, on the data it is trained on."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mte_bench.data.sources import ImageSet, take
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.encoders.encoder import Encoder
from mte_bench.errors import CorruptImage
from mte_bench.knn_bank import Bank
from mte_bench.knn_vote import search, vote

MOST_BANK, MOST_QUERIES = 50_000, 5_000
K, TEMPERATURE = 10, 0.07


class _Images(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: ImageSet, transform: EvaluationTransform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image and its label; -1 for one that cannot be read."""
        try:
            return self.transform(self.images.image(index)), int(self.images.labels[index])
        except CorruptImage:
            return torch.zeros(3, self.transform.crop, self.transform.crop), -1


def knn_top1(encoder: Encoder, bank: ImageSet, queries: ImageSet, device: torch.device, workers: int) -> float:
    """Top-1 of DINO's weighted 10-NN in percent, with at most 50,000 images in the bank and 5,000 queries.

    Images without a label or that cannot be read are left out. A look at the run, not a record: ``mte-bench knn``
    makes those.
    """
    features, labels = _encode(encoder, take(bank, "images", MOST_BANK), device, workers)
    asked, truth = _encode(encoder, take(queries, "images", MOST_QUERIES), device, workers)
    similarities, indices = search(asked, Bank(features.cpu().numpy(), device), min(K, len(features)))
    ranked = vote(similarities, labels.cpu()[indices.cpu()], len(bank.classes), [similarities.shape[1]], TEMPERATURE)
    return 100 * (ranked[similarities.shape[1]][:, 0] == truth.cpu()).double().mean().item()


@torch.no_grad()
def classifier_top1(encoder: Encoder, head: nn.Module, queries: ImageSet, device: torch.device, workers: int) -> float:
    """Top-1 of the global token's classifier ``head`` in percent, on at most 5,000 images."""
    features, labels = _encode(encoder, take(queries, "images", MOST_QUERIES), device, workers)
    return 100 * (head(features.unsqueeze(0))[0].argmax(-1) == labels).double().mean().item()


@torch.no_grad()
def _encode(encoder: Encoder, images: ImageSet, device: torch.device, workers: int) -> tuple[Tensor, Tensor]:
    """Global tokens ``n c`` and labels of the images that have one and can be read."""
    transform = EvaluationTransform.for_size(encoder.spec.side, encoder.spec.mean, encoder.spec.std)
    loader = DataLoader(_Images(images, transform), batch_size=256, num_workers=workers)
    was_training = encoder.training
    encoder.eval().use_drop_path(None)
    parts = [(encoder(batch.to(device)).global_token.float(), labels) for batch, labels in loader]
    encoder.train(was_training)
    features, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    known = labels >= 0
    return features[known.to(device)], labels[known].to(device)
