"""``python -m clipft`` is the ``clipft`` command."""

from clipft.cli.app import main

main()
