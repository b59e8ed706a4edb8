"""Read an export as `tinker.Datum` objects with the module that the export contains. The loss runs on a server."""

import sys

import common
import tinker


def main() -> None:
    """Read all documents."""
    export, _, output = common.arguments()
    sys.path.insert(0, str(export))
    import ftdata_tokens

    documents = []
    for datum in ftdata_tokens.load("train"):
        inputs = datum.model_input.to_ints()
        targets, weights = (datum.loss_fn_inputs[name].to_numpy().tolist() for name in ("target_tokens", "weights"))
        # The loss is the sum of weight times cross-entropy of the targets.
        ids = [*inputs, targets[-1]]
        assert ids[1:] == targets
        labels = [target if weight else common.IGNORE_INDEX for target, weight in zip(targets, weights, strict=True)]
        documents.append((ids, labels))
    common.save(output, documents, f"tinker {tinker.__version__}")


main()
