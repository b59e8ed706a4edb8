"""Errors: four parts, a built-in base class and an exit code, picklable."""

import pickle

from ftdata.errors import BadRow, BadRows, FtdataError, InputRefused, suggest_names


def test_errors_have_four_parts_and_survive_pickling():
    error = BadRow("code", "what", where="file:3", hint="do this", field="messages[0]")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "[code] file:3: what. Fix: do this"
    assert (again.code, again.where, again.hint, again.field) == ("code", "file:3", "do this", "messages[0]")
    many = pickle.loads(pickle.dumps(BadRows(30, ["a", "b"], hint="h")))
    assert many.count == 30
    assert str(many) == "[bad_rows] 30 rows are invalid:\n  a\n  b\nFix: h"


def test_every_error_also_inherits_from_a_builtin_error():
    def leaves(kind):
        return [kind, *(leaf for child in kind.__subclasses__() for leaf in leaves(child))]

    for kind in leaves(FtdataError)[1:]:
        assert any(
            not issubclass(base, FtdataError) and base is not Exception
            for base in kind.__mro__
            if issubclass(base, Exception)
        )
        assert kind.exit_code in {2, 3, 4, 5, 6, 7}
    assert issubclass(InputRefused, ValueError)


def test_nearest_without_candidates():
    assert suggest_names("x", []) == "known: "
