from pathlib import Path

import pytest
import yaml

from memcube.config import Config, load_config
from memcube.errors import BadRequest
from memcube.ids import TenantId


def written(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text)
    return file


def test_without_a_file_all_defaults_hold():
    assert load_config() == Config()


def test_a_file_changes_what_it_names_and_an_override_wins_over_it(tmp_path: Path):
    file = written(tmp_path, "http: {port: 9000, host: 0.0.0.0}\nplaintext: {shards: 4}\n")
    config = load_config(file, ["http.port=9001"])
    assert (config.http.port, config.http.host, config.plaintext.shards) == (9001, "0.0.0.0", 4)
    assert config.reader == Config().reader


def test_an_override_is_read_as_yaml():
    config = load_config(
        None,
        [
            "embedder.threads=2",
            "ray.dashboard=true",
            "catalog.url=postgresql://db/memcube",
            "reader.llm={base_url: 'http://localhost:1/v1', model: m=n}",
            "data_dir=/tmp/a=b",
        ],
    )
    assert config.embedder.threads == 2
    assert config.ray.dashboard is True
    assert config.catalog.url == "postgresql://db/memcube"
    assert config.reader.llm is not None
    assert config.reader.llm.model == "m=n"
    assert config.data_dir == Path("/tmp/a=b")


def test_a_mode_called_off_is_no_boolean():
    config = load_config(None, ["activation.composing=off", "chat.mode=off", "gateway.replicas=2"])
    assert (config.activation.composing, config.chat.mode) == ("off", "off")
    switched = load_config(None, ["activation.encrypt=no", "model.allow_download=TRUE"])
    assert (switched.activation.encrypt, switched.model.allow_download) == (False, True)


def test_a_later_override_wins():
    assert load_config(None, ["http.port=1", "http.port=2"]).http.port == 2


def test_an_empty_file_is_all_defaults(tmp_path: Path):
    assert load_config(written(tmp_path, "# nothing\n")) == Config()


@pytest.mark.parametrize("name", ["embedded", "gpu", "cluster"])
def test_the_configurations_that_are_shipped_are_valid(name: str):
    load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("http.prot=1", "http.port"),
        ("htpp.port=1", "http"),
        ("plaintext.shard=2", "plaintext.shards"),
        ("reader.llm={base_url: x, model: y, timeout: 3}", "reader.llm.timeout_s"),
        ("limits.topk=3", "limits.top_k"),
        ("data-dir=x", "data_dir"),
    ],
)
def test_an_unknown_key_is_refused_and_names_the_nearest(override: str, nearest: str):
    with pytest.raises(BadRequest, match=f"did you mean '{nearest}") as refused:
        load_config(None, [override])
    assert refused.value.field


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("http.port=70000", "http.port"),
        ("http.port=nine", "http.port"),
        ("plaintext.backend=faiss", "plaintext.backend"),
        ("plaintext.shards=0", "plaintext.shards"),
        ("limits.messages=0", "limits.messages"),
        ("http=7", "http"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(override: str, field: str):
    with pytest.raises(BadRequest) as refused:
        load_config(None, [override])
    assert refused.value.field == field


@pytest.mark.parametrize(
    "override", ["http.port", "=3", "", "http.port=[", "http.port={a", "http.port=\x00", "a=&b *c"]
)
def test_what_is_no_override_is_refused(override: str):
    with pytest.raises(BadRequest):
        load_config(None, [override])


def test_an_override_below_a_value_is_refused(tmp_path: Path):
    with pytest.raises(BadRequest, match="not a section"):
        load_config(written(tmp_path, "data_dir: x\n"), ["data_dir.x=1"])


@pytest.mark.parametrize("text", ["- a\n", "just words\n", "a: [\n", "\x00", "http: {1: 2}\n"])
def test_a_file_that_holds_no_configuration_is_refused(tmp_path: Path, text: str):
    with pytest.raises(BadRequest):
        load_config(written(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(BadRequest, match=r"config\.yaml"):
        load_config(file)


@pytest.mark.parametrize("path", ["missing.yaml", "."])
def test_a_file_that_can_not_be_read_is_refused_by_its_name(tmp_path: Path, path: str):
    with pytest.raises(BadRequest, match="can't be read"):
        load_config(tmp_path / path)


def test_a_yaml_tag_makes_no_object(tmp_path: Path):
    canary = tmp_path / "canary"
    tagged = f"data_dir: !!python/object/apply:os.mkdir ['{canary}']\n"
    with pytest.raises(BadRequest):
        load_config(written(tmp_path, tagged))
    with pytest.raises(BadRequest):
        load_config(None, [f"data_dir=!!python/object/apply:os.mkdir ['{canary}']"])
    assert not canary.exists()


def test_the_environment_gives_addresses_where_the_configuration_has_none(tmp_path: Path):
    config = Config(data_dir=tmp_path)
    assert config.catalog_url({}) == f"sqlite:///{tmp_path}/catalog.db"
    assert config.catalog_url({"DATABASE_URL": "postgresql://db"}) == "postgresql://db"
    assert config.qdrant_url({"QDRANT_URL": "http://q"}) == "http://q"
    with pytest.raises(BadRequest, match="QDRANT_URL"):
        config.qdrant_url({})
    named = load_config(None, ["catalog.url=sqlite:///x.db", "plaintext.url=http://own"])
    assert named.catalog_url({"DATABASE_URL": "postgresql://db"}) == "sqlite:///x.db"
    assert named.qdrant_url({"QDRANT_URL": "http://q"}) == "http://own"


def test_the_dump_is_the_same_configuration_again(tmp_path: Path):
    config = load_config(None, ["http.port=9000", "reader.llm={base_url: x, model: y}"])
    assert load_config(written(tmp_path, config.dump())) == config


def test_the_dump_holds_no_password_of_an_address():
    dumped = load_config(
        None, ["catalog.url=postgresql://ann:canary@db/memcube", "plaintext.url=http://a:canary@q"]
    ).dump()
    assert "canary" not in dumped
    assert yaml.safe_load(dumped)["catalog"]["url"] == "postgresql://ann:***@db/memcube"


# -- the scheduler ---------------------------------------------------------------------------------


def test_a_tenants_profile_changes_the_common_one_which_changes_the_default():
    config = load_config(
        None,
        [
            "scheduler.profile={promote_score: 0.6, strategies: {cost: 1, lru: 0.5}}",
            "scheduler.tenants={acme: {demote_score: 0.1}}",
            "scheduler.limits={max_moves: 2}",
            "scheduler.consents=[acme]",
        ],
    ).scheduler
    profiles = config.profiles()
    assert (profiles.default.promote_score, profiles.default.demote_score) == (0.6, 0.25)
    acme = profiles.of(TenantId("acme"))
    assert (acme.promote_score, acme.demote_score, acme.strategies) == (
        0.6,
        0.1,
        {"cost": 1.0, "lru": 0.5},
    )
    assert config.move_limits().max_moves == 2
    assert config.consents_to_training(TenantId("acme"))
    assert not config.consents_to_training(TenantId("other"))
    whole = load_config(None, ["scheduler.consents=all"]).scheduler
    assert whole.consents_to_training(TenantId("other"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("scheduler.profile={promote_scor: 1}", "did you mean 'scheduler.profile.promote_score'"),
        ("scheduler.profile={promote_score: 0.1}", "demote_score must lie below promote_score"),
        ("scheduler.profile={settle_s: -1}", "scheduler.profile.settle_s: must not be below 0"),
        ("scheduler.profile={policies: [hope]}", "no policy named 'hope'"),
        (
            "scheduler.tenants={acme: {strategies: {luck: 1}}}",
            "scheduler.tenants.acme: no strategy",
        ),
        ("scheduler.tenants={acme: {rate: 0}}", "scheduler.tenants.acme.rate: must be above 0"),
        ("scheduler.limits={max_moves: 0}", "scheduler.limits.max_moves: must be 1 or more"),
        ("scheduler.consents=some", "scheduler.consents: a list of tenants, or all"),
    ],
)
def test_what_can_not_be_of_the_scheduler_is_refused_when_it_is_read(override, told):
    with pytest.raises(BadRequest) as refused:
        load_config(None, [override])
    assert told in str(refused.value)
