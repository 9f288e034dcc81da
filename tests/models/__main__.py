"""Prove the models here, and find every mistake planted in them: `python -m tests.models --help`."""

from tests.models.check import main

if __name__ == '__main__':
    raise SystemExit(main())
