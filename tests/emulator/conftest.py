import pytest
from emulator_cases import Library, library


@pytest.fixture(scope="session")
def plain() -> Library:
    return library(False)


@pytest.fixture(scope="session")
def checked() -> Library:
    return library(True)
