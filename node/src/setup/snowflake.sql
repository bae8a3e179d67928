CREATE SEQUENCE IF NOT EXISTS anabranch.snowflake_seq AS bigint MINVALUE 1 MAXVALUE 9007199254740991 NO CYCLE;
CREATE SEQUENCE IF NOT EXISTS anabranch.snowflake_lift AS bigint NO CYCLE;
COMMENT ON SEQUENCE anabranch.snowflake_seq IS 'Milliseconds since 2024-01-01 UTC, shifted by 12 bits, and a counter: the last id of this node without the node. It only goes up.';
COMMENT ON SEQUENCE anabranch.snowflake_lift IS 'Odd while snowflake_seq is being lifted to the clock: what is drawn then is thrown away.';
CREATE OR REPLACE FUNCTION anabranch.snowflake() RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $f$
DECLARE
    before bigint := pg_sequence_last_value('anabranch.snowflake_lift');
    drawn bigint := nextval('anabranch.snowflake_seq');
    clock bigint := (date_part('epoch', clock_timestamp()) * 1000)::bigint - @EPOCH_MS@;
BEGIN
    -- Usually: nobody lifted meanwhile, and it is not far behind the clock.
    IF (before & 1) = 0 AND before = pg_sequence_last_value('anabranch.snowflake_lift') AND (drawn >> 12) >= clock - @SLACK_MS@ THEN
        RETURN ((drawn >> 12) << 22) | (@NODE@::bigint << 12) | (drawn & 4095);
    END IF;
    -- The lock goes with the block's subtransaction, whether that ends by the exception below, an error or a cancel.
    BEGIN
        PERFORM pg_advisory_xact_lock(@LOCK@);
        WHILE nextval('anabranch.snowflake_lift') & 1 = 0 LOOP
        END LOOP;
        -- A clock that is beyond what fits is not followed.
        IF clock < (1::bigint << 41) AND (clock << 12) > coalesce(pg_sequence_last_value('anabranch.snowflake_seq'), 0) THEN
            PERFORM setval('anabranch.snowflake_seq', clock << 12);
        END IF;
        PERFORM nextval('anabranch.snowflake_lift');
        drawn := nextval('anabranch.snowflake_seq');
        RAISE EXCEPTION USING ERRCODE = 'AB001', MESSAGE = 'unlock';
    EXCEPTION WHEN SQLSTATE 'AB001' THEN
        RETURN ((drawn >> 12) << 22) | (@NODE@::bigint << 12) | (drawn & 4095);
    END;
END $f$;
GRANT EXECUTE ON FUNCTION anabranch.snowflake() TO PUBLIC;
