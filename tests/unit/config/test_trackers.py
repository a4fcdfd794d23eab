"""The tables of trackers: what they refuse."""

import pytest
import training

from titan_cpt.common.recipe import fingerprint
from titan_cpt.data.inventory import take_inventory
from titan_cpt.errors import ConfigError
from titan_cpt.planning.planner import make_plan


def config_with(tmp_path, **trackers):
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["metrics"] |= trackers
    return training.config_of(raw)


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        ({"wandb": {"projekt": "x"}}, r"metrics\.wandb\.projekt: unknown key; did you mean 'project'\?"),
        ({"wandb": {"mode": "ofline"}}, r"metrics\.wandb\.mode: must be one of 'online', 'offline'.*mean 'offline'"),
        ({"wandb": True}, r"metrics\.wandb: must be a table"),
        ({"wandbb": {}}, r"metrics\.wandbb: unknown key; did you mean 'wandb'\?"),
        ({"mlflow": {"tracking_uri": "http://me:secret@host:5000"}}, r"tracking_uri: must not contain a user name"),
        ({"trackio": {"server_url": "http://host/?write_token=abc"}}, r"server_url: must not contain a user name"),
        ({"tracker_timeout_seconds": -1.0}, r"metrics\.tracker_timeout_seconds: must be"),
    ],
)
def test_a_mistake_is_named(tmp_path, trackers, message):
    """Key, value and what is allowed; secrets do not get into the resolved config."""
    with pytest.raises(ConfigError, match=message) as caught:
        config_with(tmp_path, **trackers)
    assert "secret@" not in str(caught.value)


def test_trackers_do_not_change_the_recipe(tmp_path):
    """An old run resumes with a tracker."""
    recipes = [
        make_plan(config, take_inventory(config), 1).recipe_until(1)
        for config in (
            config_with(tmp_path),
            config_with(tmp_path, wandb={"mode": "offline"}, mlflow={}, trackio={"project": "p"}),
        )
    ]
    assert fingerprint(recipes[0]) == fingerprint(recipes[1])
